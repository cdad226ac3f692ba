"""The order of a save, a disk that fails, and saves in the background."""

import errno
import os

import pytest
import torch
from rotations import rotating, steps_in
from toys import batches, same

from camshaft.checkpoints import files, writer


def spied_disk(monkeypatch):
    """Records the operations that reach the disk, in order."""
    log = []

    def spy(module, name, describe):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (log.append(describe(*args)), real(*args, **kwargs))[1])

    kind = {True: "fsync folder", False: "fsync file"}
    spy(os, "fsync", lambda descriptor: kind[os.path.isdir(f"/proc/self/fd/{descriptor}")])
    spy(os, "replace", lambda source, target: f"rename to {os.path.basename(target)}")
    spy(files.Path, "unlink", lambda path, *_: f"delete {path.name}")
    return log


def test_a_save_writes_renames_updates_the_index_and_only_then_deletes(tmp_path, monkeypatch):
    trainer, _ = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2))
    log = spied_disk(monkeypatch)
    trainer.run(batches(2), max_epochs=2)
    assert log == [
        "fsync file",
        "rename to step-00000004.pt",
        "fsync folder",
        "fsync file",
        "rename to checkpoints.json",
        "fsync folder",
        "delete step-00000002.pt",
    ]


def full_disk(monkeypatch, call, times=99):
    """Makes a function of the operating system fail as on a full disk, this many times."""
    real, left = getattr(os, call), [times]

    def fail(*args, **kwargs):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_is_one_warning_and_training_continues(call, tmp_path, monkeypatch):
    trainer, checkpoints = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2))
    full_disk(monkeypatch, call, times=1)
    with pytest.warns(
        RuntimeWarning, match="step-00000004.pt could not be written .No space left.*untouched; training continues"
    ):
        trainer.run(batches(2), max_epochs=2)
    assert trainer.state.optimizer_step == 4
    assert not list(tmp_path.glob(".camshaft-*"))
    assert checkpoints.last.is_file()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_older_files_survive_failed_saves(call, tmp_path, monkeypatch):
    trainer, checkpoints = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2))
    before = (tmp_path / "step-00000002.pt").read_bytes()
    full_disk(monkeypatch, call)
    with (
        pytest.warns(RuntimeWarning, match="could not be written"),
        pytest.raises(OSError, match="3 saves in a row have failed"),
    ):
        trainer.run(batches(2), max_epochs=9)
    assert trainer.state.epoch == 4
    assert steps_in(tmp_path) == [2]
    assert (tmp_path / "step-00000002.pt").read_bytes() == before
    monkeypatch.undo()
    fresh, again = rotating(tmp_path)
    assert again.resume() == checkpoints.last
    assert fresh.state.optimizer_step == 2


def test_a_save_that_succeeds_resets_the_count_of_failures(tmp_path, monkeypatch):
    trainer, _ = rotating(tmp_path)
    real = writer.save_durably

    def flaky(content, path):
        if trainer.state.epoch in (2, 3, 5, 6):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(content, path)

    monkeypatch.setattr(writer, "save_durably", flaky)
    with pytest.warns(RuntimeWarning, match="could not be written") as caught:
        trainer.run(batches(1), max_epochs=7)
    assert len(caught) == 4
    assert steps_in(tmp_path) == [1, 4, 7]


def test_an_index_that_can_not_be_written_deletes_nothing(tmp_path, monkeypatch):
    trainer, _ = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2))
    real = os.replace

    def fail_for_index(source, target):
        if str(target).endswith(".json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", fail_for_index)
    with pytest.warns(RuntimeWarning, match="could not be written"):
        trainer.run(batches(2), max_epochs=2)
    assert steps_in(tmp_path) == [2, 4]


def test_an_attribute_that_can_not_be_saved_raises_at_once(tmp_path):
    from camshaft import Handler

    class Odd(Handler):
        saved = ("thing",)
        thing = object()

    trainer, _ = rotating(tmp_path)
    Odd().attach(trainer)
    with pytest.raises(TypeError, match=r"Odd.thing is a builtins.object, which a checkpoint can't carry safely"):
        trainer.run(batches(1))


def test_checkpoints_written_in_the_background_are_the_same(tmp_path):
    for name, background in (("front", False), ("back", True)):
        trainer, _ = rotating(tmp_path / name, keep_last=2, background=background)
        trainer.run(batches(2), max_epochs=3)
    front, back = ([torch.load(p, weights_only=True) for p in sorted((tmp_path / n).glob("*.pt"))] for n in ("front", "back"))
    assert steps_in(tmp_path / "front") == steps_in(tmp_path / "back") == [4, 6]
    for a, b in zip(front, back, strict=True):
        assert same(list(a["phases"]["model"]["module"].values()), list(b["phases"]["model"]["module"].values()))


def test_a_failed_save_in_the_background_warns_and_the_third_raises(tmp_path, monkeypatch):
    trainer, checkpoints = rotating(tmp_path, background=True)
    checkpoints.save()
    full_disk(monkeypatch, "fsync")
    with pytest.warns(RuntimeWarning, match="training continues"), pytest.raises(OSError, match="3 saves in a row have failed"):
        trainer.run(batches(1), max_epochs=9)
