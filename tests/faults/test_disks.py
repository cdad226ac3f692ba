"""A disk that is full or read-only, and files that somebody deletes, cost at most the saves that fail."""

import errno
import os
import re
import resource
import shutil
import subprocess
import tempfile

import pytest
from faulty import Child, all_good, assert_of_one_step, checkpoints, counting_run, leftovers, train

from camshaft import Events
from camshaft.checkpoints import writer

ROOM = 300_000
"""A model with this many weights makes checkpoints of 1.2 MB."""


def at(trainer, step, function):
    """Calls a function before a step."""
    trainer.add_event_handler(Events.ITERATION_STARTED(once=step), lambda: function())


def assert_resumes_from(folder, step, **options):
    assert leftovers(folder) == []
    assert all_good(folder)
    trainer, rotation = counting_run(folder, **options)
    assert rotation.resume("auto") == rotation.last == folder / f"step-{step:08d}.pt"
    assert assert_of_one_step(trainer) == step
    return trainer


def test_a_disk_that_fills_up(small_disk):
    folder = small_disk("3m")
    trainer, _ = counting_run(folder, size=ROOM, keep_last=5)
    with (
        pytest.warns(
            RuntimeWarning, match=r"step-0000000[34]\.pt could not be written \(No space.*training continues"
        ) as warned,
        pytest.raises(OSError, match=r"step-00000005\.pt could not be written .*; 3 saves in a row have failed"),
    ):
        train(trainer, 100)
    assert len(warned) == 2
    assert "about 1,2" in str(warned[0].message)
    assert checkpoints(folder) == [1, 2]
    assert_resumes_from(folder, 2, size=ROOM)


def test_a_disk_that_is_full_for_a_while(small_disk):
    folder = small_disk("4m")
    ballast = folder / "ballast"
    trainer, rotation = counting_run(folder, size=ROOM, keep_last=1)
    for full, free in ((2, 4), (6, 8)):
        at(trainer, full, lambda: ballast.write_bytes(bytes(1_800_000)))
        at(trainer, free, lambda: ballast.unlink())
    with pytest.warns(RuntimeWarning, match="training continues") as warned:
        train(trainer, 9)
    assert len(warned) == 4
    assert checkpoints(folder) == [9]
    assert_resumes_from(folder, 9, size=ROOM)


MODES = pytest.mark.parametrize("options", [{}, {"background": True}, {"sharded": True}], ids=["file", "background", "sharded"])


@MODES
def test_a_disk_that_is_full_from_the_start_ends_the_run_at_once(small_disk, options):
    folder = small_disk("1m")
    trainer, _ = counting_run(folder, size=ROOM, **options)
    with pytest.raises(OSError, match=r"step-00000001.* could not be written \(.*nothing was ever saved in this folder"):
        train(trainer, 100)
    assert trainer.state.iteration <= 2  # in the background the error is reported one iteration later
    assert checkpoints(folder) == []
    assert leftovers(folder) == []


@MODES
def test_a_disk_that_is_full_at_a_restart_keeps_what_was_saved(small_disk, options):
    folder = small_disk("3m")
    trainer, rotation = counting_run(folder, size=ROOM, keep_last=1, **options)
    train(trainer, 1)
    rotation.detach()
    (folder / "ballast").write_bytes(bytes(1_500_000))
    trainer, rotation = counting_run(folder, size=ROOM, keep_last=1, **options)
    last = rotation.resume("auto")
    with pytest.warns(RuntimeWarning, match="training continues"), pytest.raises(OSError, match="3 saves in a row have failed"):
        train(trainer, 100)
    assert rotation.resume("auto") == last


def mount_read_only(folder):
    """Mounts a read-only view over a folder: the file system has an open file, and cannot become read-only itself."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def test_a_disk_that_turns_read_only(small_disk):
    folder = small_disk("20m")
    trainer, _ = counting_run(folder)
    at(trainer, 3, lambda: mount_read_only(folder))
    at(trainer, 5, lambda: subprocess.run(["umount", folder], check=True))
    with pytest.warns(RuntimeWarning, match="could not be written .Read-only file system.*training continues") as warned:
        train(trainer, 6)
    assert len(warned) == 2
    assert checkpoints(folder) == [5, 6]
    assert_resumes_from(folder, 6)


def limit_file_size(report, folder, size):
    """Trains; from step 3 on, no file can be larger than 100 KB."""
    trainer, _ = counting_run(folder, size=size)
    at(trainer, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: report(engine.state.iteration))
    train(trainer, 100)


def run_out_of_memory(report, folder, step, error):
    """Saves five steps in the background; one save raises an error that does not come from the file system."""
    save = writer.save_durably

    def fail(content, path):
        if path.name == f"step-{step:08d}.pt":
            raise error
        save(content, path)

    writer.save_durably = fail
    trainer, _ = counting_run(folder, background=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: report(engine.state.iteration))
    train(trainer, 5)


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("none left")], ids=["MemoryError", "RuntimeError"])
@pytest.mark.parametrize(
    ("step", "code", "text"),
    [
        (1, 1, "could not be written .*none left.*nothing was ever saved in this folder"),
        (3, 0, "could not be written .*none left.*training continues"),
        (5, 0, "could not be written .*none left.*training continues"),
    ],
)
def test_an_error_in_the_background_is_always_reported(tmp_path, step, code, text, error):
    with Child(run_out_of_memory, tmp_path / "notes", tmp_path / "run", step, error) as child:
        assert child.join() == code, child.error()
        assert re.search(text, child.error())
    assert checkpoints(tmp_path / "run") == {1: [], 3: [4, 5], 5: [3, 4]}[step]


def test_a_limit_on_the_size_of_files(tmp_path):
    folder = tmp_path / "run"
    with Child(limit_file_size, tmp_path / "notes", folder, ROOM) as child:
        assert child.join() == 1
        assert child.reported == [1, 2, 3, 4, 5]
        assert "could not be written (File too large)" in child.error()
        assert "3 saves in a row have failed" in child.error()
    assert checkpoints(folder) == [1, 2]
    assert_resumes_from(folder, 2, size=ROOM)


def refuse(monkeypatch, module, name, error, when=lambda *args: True):
    """Makes a function of the operating system raise."""
    works = getattr(module, name)

    def fails(*args, **kwargs):
        if when(*args):
            raise OSError(error, os.strerror(error))
        return works(*args, **kwargs)

    monkeypatch.setattr(module, name, fails)


STEPS_OF_A_SAVE = [(tempfile, "mkstemp"), (os, "fchmod"), (os, "fsync"), (os, "replace")]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES, errno.EDQUOT, errno.ESTALE])
@pytest.mark.parametrize(("module", "name"), STEPS_OF_A_SAVE)
def test_each_system_call_of_a_save_fails_with_each_error(tmp_path, monkeypatch, module, name, error):
    trainer, _ = counting_run(tmp_path)
    at(trainer, 3, lambda: refuse(monkeypatch, module, name, error))
    at(trainer, 5, monkeypatch.undo)
    with pytest.warns(RuntimeWarning, match=os.strerror(error)) as warned:
        train(trainer, 6)
    assert len(warned) == 2
    assert checkpoints(tmp_path) == [5, 6]
    assert_resumes_from(tmp_path, 6)


@pytest.mark.parametrize(("module", "name"), STEPS_OF_A_SAVE)
def test_the_older_files_remain_while_saves_fail(tmp_path, monkeypatch, module, name):
    trainer, _ = counting_run(tmp_path, keep_last=1)
    at(trainer, 3, lambda: refuse(monkeypatch, module, name, errno.EIO))
    with (
        pytest.warns(RuntimeWarning, match="the earlier checkpoints are untouched"),
        pytest.raises(OSError, match="3 saves in a row"),
    ):
        train(trainer, 9)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == [2]
    assert_resumes_from(tmp_path, 2)


def is_index(source, target):
    return str(target).endswith(".json")


def test_an_index_that_can_not_be_written_leaves_no_old_files(tmp_path, monkeypatch):
    trainer, _ = counting_run(tmp_path)
    at(trainer, 3, lambda: refuse(monkeypatch, os, "replace", errno.ENOSPC, is_index))
    at(trainer, 5, monkeypatch.undo)
    with pytest.warns(RuntimeWarning, match="training continues"):
        train(trainer, 6)
    assert checkpoints(tmp_path) == [5, 6]
    assert_resumes_from(tmp_path, 6)


def test_a_checkpoint_whose_index_failed_is_resumed(tmp_path, monkeypatch):
    trainer, _ = counting_run(tmp_path)
    at(trainer, 3, lambda: refuse(monkeypatch, os, "replace", errno.ENOSPC, is_index))
    with pytest.warns(RuntimeWarning), pytest.raises(OSError, match="3 saves in a row have failed"):
        train(trainer, 9)
    monkeypatch.undo()
    assert_resumes_from(tmp_path, 5)


def test_an_old_file_that_can_not_be_deleted_is_deleted_by_the_next_save(tmp_path, monkeypatch, caplog):
    trainer, _ = counting_run(tmp_path)
    refuse(monkeypatch, os, "unlink", errno.EBUSY, lambda path, *_: str(path).endswith(".pt"))
    at(trainer, 4, monkeypatch.undo)
    train(trainer, 5)
    assert "step-00000001.pt can't be deleted" in caplog.text
    assert checkpoints(tmp_path) == [4, 5]


def test_a_folder_that_can_not_be_written_from_the_start_raises_at_once(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="dirname: checkpoints can't be written there"):
        counting_run(tmp_path / "file" / "run")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_file_that_is_deleted_during_training(tmp_path, step):
    trainer, rotation = counting_run(tmp_path, keep_last=3)
    at(trainer, 4, lambda: (tmp_path / f"step-{step:08d}.pt").unlink())
    train(trainer, 4)
    assert checkpoints(tmp_path) == sorted({1, 2, 3, 4} - {step})
    assert [entry.optimizer_step for entry in rotation.index.entries] == checkpoints(tmp_path)
    train_on = assert_resumes_from(tmp_path, 4, keep_last=3)
    train(train_on, 6)
    assert checkpoints(tmp_path) == [4, 5, 6]


def test_an_index_that_is_deleted_during_training(tmp_path):
    trainer, _ = counting_run(tmp_path)
    at(trainer, 3, (tmp_path / "checkpoints.json").unlink)
    train(trainer, 5)
    assert checkpoints(tmp_path) == [4, 5]
    assert_resumes_from(tmp_path, 5)


def test_a_folder_that_is_deleted_during_training(tmp_path):
    folder = tmp_path / "run"
    trainer, _ = counting_run(folder)
    at(trainer, 3, lambda: shutil.rmtree(folder))
    at(trainer, 4, folder.mkdir)
    with pytest.warns(RuntimeWarning, match=r"could not be written .No such file or directory.*training continues"):
        train(trainer, 5)
    assert checkpoints(folder) == [4, 5]
    assert_resumes_from(folder, 5)


def test_files_of_the_user_are_not_touched(tmp_path):
    names = ["notes.txt", "step-1.pt", "step-00000001.pt.bak", "model.pt", ".camshaft", "step-00000000.pt"]
    for name in names:
        (tmp_path / name).write_text("mine")
    trainer, _ = counting_run(tmp_path, keep_last=1)
    train(trainer, 4)
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.name in names} == dict.fromkeys(names, "mine")
    assert (tmp_path / "step-00000004.pt").exists()
