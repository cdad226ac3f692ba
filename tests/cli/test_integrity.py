"""All damage is found, and nothing else is reported."""

import json
import shutil

import pytest
import torch
from runs_on_disk import flip, train, truncate

from camshaft.checkpoints.files import save_durably
from camshaft.cli.integrity import check_folder


@pytest.fixture
def folder(tmp_path):
    """A folder with two checkpoints, of step 6 and step 9, and their index."""
    train(tmp_path, board=False)
    return tmp_path / "checkpoints"


def bad(folder):
    """File -> what is wrong with it."""
    return {verdict.file: verdict.reason for verdict in check_folder(folder).bad}


def test_what_was_written_is_good_and_listed(folder):
    found = check_folder(folder)
    assert [verdict.file for verdict in found.files] == ["checkpoints.json", "step-00000006.pt", "step-00000009.pt"]
    assert found.bad == []
    assert [verdict.listed for verdict in found.files] == [False, True, True]


@pytest.mark.parametrize("at", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_is_found_and_the_other_file_is_good(at, folder):
    flip(folder / "step-00000006.pt", at)
    assert bad(folder) == {"step-00000006.pt": "is damaged: its bytes don't match its checksum"}


def test_a_file_that_was_cut_off_is_bad(folder):
    truncate(folder / "step-00000009.pt")
    assert bad(folder) == {"step-00000009.pt": "is damaged or no checkpoint: File is not a zip file"}


def test_an_empty_file_is_bad(folder):
    truncate(folder / "step-00000009.pt", left=0)
    assert list(bad(folder)) == ["step-00000009.pt"]


def test_a_listed_file_that_is_missing_is_bad(folder):
    (folder / "step-00000006.pt").unlink()
    assert bad(folder) == {"step-00000006.pt": "does not exist"}


def test_a_file_without_its_checksum_is_bad(folder):
    torch.save({"phases": {}}, folder / "step-00000006.pt")
    assert bad(folder) == {"step-00000006.pt": "is damaged or no checkpoint: it doesn't end with its checksum"}


def test_an_undamaged_file_that_holds_something_else_is_bad(folder):
    save_durably({"weights": torch.ones(1)}, folder / "step-00000006.pt")
    assert bad(folder) == {"step-00000006.pt": "is not a checkpoint of a trainer"}


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def test_a_file_that_would_run_code_is_bad_and_runs_none(folder):
    save_durably({"phases": Evil()}, folder / "step-00000006.pt")
    assert "holds more than tensors and plain values, and was not loaded" in bad(folder)["step-00000006.pt"]


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_index_is_bad_and_its_files_are_unlisted(damage, folder):
    damage(folder / "checkpoints.json")
    assert list(bad(folder)) == ["checkpoints.json"]
    assert [verdict.listed for verdict in check_folder(folder).files] == [False, False, False]


def test_a_score_that_was_changed_in_the_index_is_found(folder):
    path = folder / "checkpoints.json"
    path.write_text(path.read_text().replace("0.75", "0.99"))
    assert bad(folder) == {"checkpoints.json": "is damaged (its text doesn't match its checksum)"}


def test_without_an_index_the_files_are_good_and_unlisted(folder):
    (folder / "checkpoints.json").unlink()
    found = check_folder(folder)
    assert [(verdict.good, verdict.listed) for verdict in found.files] == [(True, False), (True, False)]


def test_a_copy_is_good_and_unlisted(folder):
    shutil.copy(folder / "step-00000006.pt", folder / "mine.pt")
    verdict = check_folder(folder).files[-1]
    assert (verdict.file, verdict.good, verdict.listed) == ("mine.pt", True, False)


def test_weights_next_to_checkpoints_are_good_and_unlisted(folder):
    torch.save({"weight": torch.ones(2)}, folder / "weights.pt")
    verdict = check_folder(folder).files[-1]
    assert (verdict.file, verdict.good, verdict.listed) == ("weights.pt", True, False)


def test_temporary_files_of_a_killed_save_are_named_and_are_not_bad(folder):
    (folder / ".camshaft-abc.tmp").write_bytes(b"half")
    found = check_folder(folder)
    assert (found.leftovers, found.bad) == ((".camshaft-abc.tmp",), [])


def test_checking_changes_nothing_on_the_disk(folder):
    flip(folder / "step-00000006.pt")
    (folder / ".camshaft-abc.tmp").write_bytes(b"half")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    check_folder(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_as_json_is_the_same_again(folder):
    flip(folder / "step-00000006.pt")
    content = json.loads(json.dumps(check_folder(folder).as_json()))
    assert [file["good"] for file in content["files"]] == [True, False, True]
    assert content["good"] is False
