"""The path of a folder of checkpoints: relative, too long, taken by a file, or made anew."""

import os

import pytest
from toys import batches, trainer_of

from camshaft import CheckpointRotation, Events
from camshaft.checkpoints.files import check_name_lengths, save_durably


def attached(folder, **options):
    trainer = trainer_of()
    return trainer, CheckpointRotation(folder, **options).attach(trainer)


# -- relative paths -------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Starts in ``start``; called, it goes somewhere else."""
    for name in ("start", "end"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "start")
    return lambda: os.chdir(tmp_path / "end")


@pytest.mark.parametrize("dirname", ["run", "./a/b", ".", "../start/run"])
@pytest.mark.parametrize("moment", ["before attach", "before the run", "in the run", "before reading"])
def test_a_later_chdir_changes_nothing(tmp_path, elsewhere, dirname, moment):
    trainer, checkpoints = trainer_of(), CheckpointRotation(dirname, keep_last=1)
    if moment == "before attach":
        elsewhere()
    checkpoints.attach(trainer)
    if moment == "before the run":
        elsewhere()
    if moment == "in the run":
        trainer.add_event_handler(Events.EPOCH_STARTED(once=2), elsewhere)
    trainer.run(batches(2), max_epochs=3)
    elsewhere()
    folder = tmp_path / "start" / dirname
    assert os.path.samefile(checkpoints.last, folder / "step-00000006.pt")
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000006.pt"]
    assert list((tmp_path / "end").iterdir()) == []
    checkpoints.detach()
    checkpoints.attach(trainer_of())
    assert checkpoints.resume() == checkpoints.last


def test_a_path_to_resume_from_is_relative_to_the_present_folder(tmp_path, elsewhere):
    trainer, checkpoints = attached("run")
    trainer.run(batches(2))
    elsewhere()
    assert checkpoints.resume("../start/run/step-00000002.pt") is not None
    with pytest.raises(FileNotFoundError, match=r"run/step-00000002\.pt does not exist"):
        checkpoints.resume("run/step-00000002.pt")


# -- names that are too long ----------------------------------------------------------------------------------------------

LONG = ["n" * 256, "n" * 3000, "\N{GREEK SMALL LETTER ALPHA}" * 128, f"a/{'n' * 256}/b", f"{'n' * 300}/b"]


@pytest.mark.parametrize("name", LONG, ids=range(len(LONG)))
def test_a_name_over_255_bytes_is_a_clear_error_at_attach(tmp_path, name):
    size = max(len(os.fsencode(part)) for part in name.split("/"))
    text = rf"dirname: checkpoints can't be written there \(the name '.*\.\.\.' has {size} bytes, and at most 255 are allowed\)"
    with pytest.raises(OSError, match=text):
        attached(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LONG, ids=range(len(LONG)))
def test_so_it_is_for_a_path_to_resume_from_and_for_any_file(tmp_path, name):
    _, checkpoints = attached(tmp_path / "run")
    for action in (lambda: checkpoints.resume(tmp_path / name), lambda: save_durably({}, tmp_path / name)):
        with pytest.raises(OSError, match="and at most 255 are allowed"):
            action()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["n" * 255, "\N{GREEK SMALL LETTER ALPHA}" * 127])
def test_a_name_of_255_bytes_is_none(tmp_path, name):
    check_name_lengths(tmp_path / name)
    trainer, checkpoints = attached(tmp_path / name)
    trainer.run(batches(2))
    assert checkpoints.last == tmp_path / name / "step-00000002.pt"


# -- what is in the way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "run", "a/b"])
def test_a_file_in_the_way_is_named(tmp_path, inner):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"dirname: checkpoints can't be written there \(.*file is a file, not a folder\)"):
        attached(tmp_path / "file" / inner)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_broken_link_in_the_way_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    with pytest.raises(OSError, match=r"dirname: checkpoints can't be written there \(File exists\)"):
        attached(tmp_path / "link")


def test_a_path_that_is_too_long_as_a_whole_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"dirname: checkpoints can't be written there \(File name too long\)"):
        attached(tmp_path / "/".join(["n" * 200] * 30))


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    trainer, checkpoints = attached(tmp_path / "link", keep_last=1)
    trainer.run(batches(2), max_epochs=2)
    assert checkpoints.last == tmp_path / "link" / "step-00000004.pt"
    assert sorted(path.name for path in (tmp_path / "folder").glob("step-*")) == ["step-00000004.pt"]
