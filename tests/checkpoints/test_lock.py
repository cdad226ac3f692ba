"""One owner for each folder of checkpoints, in one process."""

import errno
import fcntl
import gc
import json
import os
import shutil
import socket
import stat

import pytest
import torch
from toys import batches, model_of, same, trainer_of, weights

from camshaft import CheckpointError, CheckpointRotation, Events
from camshaft.checkpoints.lock import LOCK, FolderInUseError, FolderLock


class Owner:
    is_running = False


def is_free(folder):
    """Whether the kernel's lock of a folder can be taken."""
    descriptor = os.open(folder / LOCK, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def attached(folder, **options):
    trainer = trainer_of()
    return trainer, CheckpointRotation(folder, **options).attach(trainer)


def test_attach_takes_the_folder_and_detach_releases_it(tmp_path):
    trainer, checkpoints = attached(tmp_path)
    assert not is_free(tmp_path)
    checkpoints.detach()
    assert is_free(tmp_path)
    checkpoints.attach(trainer)
    assert not is_free(tmp_path)


def test_the_with_block_releases_it(tmp_path):
    trainer = trainer_of()
    with CheckpointRotation(tmp_path).attached(trainer):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


@pytest.mark.parametrize("kept", ["nothing", "handler", "trainer"])
def test_a_folder_is_free_when_the_trainer_is_gone(tmp_path, kept):
    trainer, checkpoints = attached(tmp_path)
    trainer.run(batches(2))
    if kept != "trainer":
        del trainer
    if kept != "handler":
        del checkpoints
    gc.collect()
    assert is_free(tmp_path) == (kept != "trainer")


def test_a_trainer_that_dies_later_does_not_release_the_next_one(tmp_path):
    trainer, checkpoints = attached(tmp_path)
    checkpoints.detach()
    other = trainer_of()
    checkpoints.attach(other)
    del trainer
    gc.collect()
    assert not is_free(tmp_path)


def test_the_lock_file_says_who_holds_it(tmp_path):
    _, _ = holder = attached(tmp_path)
    signed = json.loads((tmp_path / LOCK).read_text())
    assert (signed["host"], signed["pid"]) == (socket.gethostname(), os.getpid())
    assert signed["since"].startswith("20")
    del holder


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o775, 0o777])
def test_who_may_write_into_the_folder_may_lock_it(tmp_path, mode):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(mode)
    _, _ = holder = attached(folder)
    assert stat.S_IMODE((folder / LOCK).stat().st_mode) == mode & 0o666
    del holder


# -- several handlers in one process --------------------------------------------------------------------------------------


def test_a_later_trainer_takes_the_folder_over(tmp_path):
    first, earlier = attached(tmp_path)
    first.run(batches(2))
    second, later = attached(tmp_path)
    assert later.resume("auto") == tmp_path / "step-00000002.pt"
    second.run(batches(2), max_epochs=2)
    assert later.last == earlier.last == tmp_path / "step-00000004.pt"
    with pytest.raises(FolderInUseError, match=r"belongs to a CheckpointRotation that was attached later, or runs; detach\(\)"):
        earlier.save()


def test_trainers_that_run_in_turn_have_the_folder_in_turn(tmp_path):
    first, earlier = attached(tmp_path)
    second, later = attached(tmp_path)
    first.run(batches(2))
    later.resume("auto")
    second.run(batches(2), max_epochs=2)
    assert earlier.last == later.last == tmp_path / "step-00000004.pt"
    first.run(batches(2), max_epochs=3)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"step-0000000{step}.pt" for step in (2, 4, 6)]
    with pytest.raises(FolderInUseError, match="attached later, or runs"):
        later.save()


def test_the_earlier_handler_can_take_it_again(tmp_path):
    first, earlier = attached(tmp_path)
    _, later = attached(tmp_path)
    later.detach()
    earlier.detach()
    earlier.attach(first)
    first.run(batches(2))
    assert earlier.last == tmp_path / "step-00000002.pt"


def test_a_trainer_that_is_running_keeps_its_folder(tmp_path):
    trainer, checkpoints = attached(tmp_path)
    errors = []

    @trainer.on(Events.ITERATION_COMPLETED(once=1))
    def attach_another():
        with pytest.raises(
            FolderInUseError, match="is in use by a CheckpointRotation of a trainer that is running in this process"
        ):
            attached(tmp_path)
        errors.append(True)

    trainer.run(batches(2))
    assert errors == [True]
    assert checkpoints.last == tmp_path / "step-00000002.pt"


def test_one_trainer_can_not_use_a_folder_twice(tmp_path):
    trainer, _ = attached(tmp_path)
    with pytest.raises(FolderInUseError, match="is in use by a CheckpointRotation of the same trainer; give each one a folder"):
        CheckpointRotation(tmp_path, every=Events.ITERATION_COMPLETED).attach(trainer, name="often")
    assert list(trainer.handlers) == ["CheckpointRotation"]
    trainer.run(batches(2))


def test_another_name_of_the_folder_is_the_same_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    trainer, _ = attached(tmp_path / "run")
    with pytest.raises(FolderInUseError, match="same trainer"):
        CheckpointRotation(tmp_path / "link").attach(trainer, name="other")


# -- before a write -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["the lock file", "the folder"])
def test_a_folder_that_was_deleted_is_locked_again(tmp_path, lost):
    folder = tmp_path / "run"
    trainer, checkpoints = attached(folder)
    checkpoints.save()
    if lost == "the folder":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        (folder / LOCK).unlink()
    trainer.run(batches(2))
    assert not is_free(folder)
    assert checkpoints.last == folder / "step-00000002.pt"


def test_a_folder_that_another_process_has_locked_since_is_not_written(tmp_path):
    lock = FolderLock(tmp_path)
    owner = Owner()
    lock.acquire(owner)
    (tmp_path / LOCK).unlink()
    descriptor = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(FolderInUseError, match="is in use: another process"):
        lock.check()
    os.close(descriptor)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x1b[2J", b'{"pid": "x", "host": "h", "since": ""}', b"1" * 100_000])
def test_the_error_is_clear_if_the_lock_file_is_damaged(tmp_path, content):
    descriptor = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, content)
    with pytest.raises(FolderInUseError, match=r"is in use: another process, writes its checkpoints there\. Stop that run, or"):
        attached(tmp_path)
    os.close(descriptor)


def test_the_names_in_the_lock_file_are_printed_without_control_characters(tmp_path):
    descriptor = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, json.dumps({"host": "\x1b[2J" + "h" * 900, "pid": 7, "since": "now\n"}).encode())
    with pytest.raises(FolderInUseError, match="process 7 on host") as caught:
        attached(tmp_path)
    assert all(character.isprintable() for character in str(caught.value))
    assert len(str(caught.value)) < 1000
    os.close(descriptor)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.warns(RuntimeWarning, match="has no locks .*: make sure that no other run writes there"):
        trainer, checkpoints = attached(tmp_path)
    trainer.run(batches(2))
    assert checkpoints.last == tmp_path / "step-00000002.pt"


# -- reading without a lock -----------------------------------------------------------------------------------------------


def contents_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_reading_needs_no_attach_and_changes_nothing(tmp_path):
    trainer, checkpoints = attached(tmp_path, keep_last=2)
    trainer.run(batches(2), max_epochs=3)
    (tmp_path / ".camshaft-abc.tmp").write_bytes(b"what the owner is writing")
    (tmp_path / "checkpoints.json").unlink()
    before = contents_of(tmp_path)
    reader, fresh = CheckpointRotation(tmp_path), trainer_of()
    assert reader.last == tmp_path / "step-00000006.pt"
    assert reader.best is None
    assert reader.resume("auto", fresh) == tmp_path / "step-00000006.pt"
    assert contents_of(tmp_path) == before
    assert same(weights(model_of(fresh)), weights(model_of(trainer)))


def test_a_reader_sees_what_the_owner_has_written_since(tmp_path):
    trainer, _ = attached(tmp_path)
    reader = CheckpointRotation(tmp_path)
    assert reader.last is None
    for epochs in (1, 2):
        trainer.run(batches(2), max_epochs=epochs)
        assert reader.last == tmp_path / f"step-{2 * epochs:08d}.pt"


def test_a_reader_of_a_missing_folder_finds_nothing_and_does_not_create_it(tmp_path):
    reader = CheckpointRotation(tmp_path / "none")
    assert (reader.last, reader.best, reader.resume("auto", trainer_of())) == (None, None, None)
    with pytest.raises(CheckpointError, match="there is no best checkpoint"):
        reader.resume("best", trainer_of())
    assert not (tmp_path / "none").exists()


def test_a_resume_with_a_trainer_attaches_nothing(tmp_path):
    trainer, checkpoints = attached(tmp_path)
    trainer.run(batches(2))
    checkpoints.detach()
    fresh = trainer_of()
    CheckpointRotation(tmp_path).resume("auto", fresh)
    fresh.run(batches(2), max_epochs=2)
    assert fresh.state.optimizer_step == 4
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["step-00000002.pt"]


def test_a_checkpoint_that_is_deleted_before_it_is_read_is_no_error(tmp_path, monkeypatch):
    """The owner saves and deletes after the reader has listed the folder, before it reads."""
    from camshaft.checkpoints import selection

    trainer, _ = attached(tmp_path, keep_last=1)
    trainer.run(batches(2))
    true, turns = selection.read, iter([2, 3])

    def late(path, reference):
        epochs = next(turns, None)
        if epochs is not None:
            trainer.run(batches(2), max_epochs=epochs)
        return true(path, reference)

    monkeypatch.setattr(selection, "read", late)
    fresh = trainer_of()
    assert CheckpointRotation(tmp_path).resume("auto", fresh) == tmp_path / "step-00000006.pt"
    assert fresh.state.optimizer_step == 6
    assert torch.equal(model_of(fresh).weight, model_of(trainer).weight)
