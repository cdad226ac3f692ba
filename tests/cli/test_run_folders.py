"""Which folders belong to a run, and which paths are none."""

import shutil

import pytest
from runs_on_disk import train

from camshaft.cli.folders import NoRun, find_folders


def test_a_runs_folder_has_event_files_and_checkpoints(tmp_path):
    train(tmp_path, 1)
    found = find_folders(tmp_path)
    assert (found.checkpoints, found.events) == (tmp_path / "checkpoints", tmp_path)


def test_a_folder_of_checkpoints_belongs_to_the_event_files_next_to_it(tmp_path):
    train(tmp_path, 1)
    found = find_folders(tmp_path / "checkpoints")
    assert (found.checkpoints, found.events) == (tmp_path / "checkpoints", tmp_path)


def test_a_relative_folder_of_checkpoints_finds_them_too(tmp_path, monkeypatch):
    train(tmp_path, 1)
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert find_folders(tmp_path.cwd().relative_to(tmp_path.cwd())).events == tmp_path


def test_a_run_without_event_files_has_none(tmp_path):
    train(tmp_path, 1, board=False)
    assert find_folders(tmp_path).events is None
    assert find_folders(tmp_path / "checkpoints").events is None


def test_a_run_without_checkpoints_has_none(tmp_path):
    train(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    assert find_folders(tmp_path).checkpoints is None


def test_checkpoints_are_found_without_their_index(tmp_path):
    train(tmp_path, 1, board=False)
    (tmp_path / "checkpoints" / "checkpoints.json").unlink()
    assert find_folders(tmp_path).checkpoints == tmp_path / "checkpoints"


def test_the_folder_of_checkpoints_may_have_any_name(tmp_path):
    train(tmp_path, 1)
    (tmp_path / "checkpoints").rename(tmp_path / "saved [1]")
    assert find_folders(tmp_path).checkpoints == tmp_path / "saved [1]"


def test_several_folders_of_checkpoints_are_an_error_that_names_them(tmp_path):
    train(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy")
    with pytest.raises(NoRun, match="has several folders of checkpoints; give one of .*checkpoints, .*copy"):
        find_folders(tmp_path)


@pytest.mark.parametrize("board", [True, False], ids=["with event files", "without"])
def test_a_folder_of_runs_is_no_run_but_names_them(board, tmp_path):
    train(tmp_path / "second", 1, board=board)
    shutil.copytree(tmp_path / "second", tmp_path / "first")
    (tmp_path / "notes").mkdir()
    named = f"{tmp_path / 'first'}, {tmp_path / 'second'}$"
    with pytest.raises(NoRun, match=f"is a folder of runs; give one of them: {named}"):
        find_folders(tmp_path)


def test_of_many_runs_some_are_named(tmp_path):
    train(tmp_path / "run-10", 1)
    for number in range(11, 25):
        shutil.copytree(tmp_path / "run-10", tmp_path / f"run-{number}")
    with pytest.raises(NoRun, match=r"run-10, .*run-21 and 3 more$"):
        find_folders(tmp_path)


def test_a_folder_of_other_files_is_no_run(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(NoRun, match=r"no checkpoints.json and no step-\.\.\. in it"):
        find_folders(tmp_path)


def test_a_path_that_does_not_exist_is_reported(tmp_path):
    with pytest.raises(NoRun, match="misspelt does not exist; give a run's folder such as runs/mnist"):
        find_folders(tmp_path / "misspelt")


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NoRun, match="file is a file; give a run's folder"):
        find_folders(tmp_path / "file")
