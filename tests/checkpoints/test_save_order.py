"""The newest checkpoint is told by the number of its save, which it holds itself, and never by a clock."""

import datetime
import json
import os
import shutil
import zlib

import pytest
import torch
from toys import batches, trainer_of

from camshaft import CheckpointRotation
from camshaft.checkpoints import progress
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import save_durably
from camshaft.checkpoints.index import Entry, Index
from camshaft.checkpoints.names import EARLIEST_TIME, file_name

LOST = pytest.mark.parametrize("index", ["kept", "lost"])


def attached(folder, **options):
    trainer = trainer_of()
    return trainer, CheckpointRotation(folder, **{"keep_last": 9, **options}).attach(trainer)


def lose(folder, index):
    if index == "lost":
        (folder / "checkpoints.json").unlink()


def order(folder):
    return [(entry.optimizer_step, entry.written) for entry in Index(folder).entries]


def branched(folder):
    """Steps 1 to 4 are saved; then a run resumes from step 2 and saves step 3 once more."""
    trainer, _ = attached(folder)
    trainer.run(batches(1), max_epochs=4)
    trainer, checkpoints = attached(folder)
    checkpoints.resume(folder / "step-00000002.pt")
    trainer.state.metrics["branch"] = 1.0
    trainer.run(batches(1), max_epochs=3)
    checkpoints.detach()


@LOST
def test_saves_are_numbered(tmp_path, index):
    trainer, checkpoints = attached(tmp_path)
    trainer.run(batches(1), max_epochs=3)
    lose(tmp_path, index)
    assert order(tmp_path) == [(1, 1), (2, 2), (3, 3)]
    assert load_checked(checkpoints.last)["rotation"]["entry"]["written"] == 3


@LOST
def test_a_restart_goes_on_counting(tmp_path, index):
    trainer, _ = attached(tmp_path, keep_last=1)
    trainer.run(batches(1), max_epochs=3)
    lose(tmp_path, index)
    trainer, checkpoints = attached(tmp_path)
    checkpoints.resume()
    trainer.run(batches(1), max_epochs=5)
    assert order(tmp_path) == [(3, 3), (4, 4), (5, 5)]


@LOST
def test_the_last_save_is_the_newest_though_its_step_is_not_the_highest(tmp_path, index):
    branched(tmp_path)
    lose(tmp_path, index)
    assert order(tmp_path) == [(1, 1), (2, 2), (4, 4), (3, 5)]
    trainer, checkpoints = attached(tmp_path)
    assert checkpoints.resume() == tmp_path / "step-00000003.pt"
    assert trainer.state.metrics["branch"] == 1.0


@pytest.mark.parametrize("number", range(1, 6))
def test_so_it_is_with_the_index_of_an_earlier_save(tmp_path, number):
    """A kill after the rename: whatever an earlier index lists, the checkpoints tell what came after it."""
    branched(tmp_path / "run")
    content = json.loads((tmp_path / "run" / "checkpoints.json").read_text())
    content["checkpoints"] = [entry for entry in content["checkpoints"] if entry["written"] < number]
    del content["crc32"]
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (tmp_path / "run" / "checkpoints.json").write_text(json.dumps(content | {"crc32": crc32}))
    assert CheckpointRotation(tmp_path / "run").last == tmp_path / "run" / "step-00000003.pt"


@LOST
def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch, index):
    class Clock(datetime.datetime):
        hour = 23

        @classmethod
        def now(cls, zone=None):
            cls.hour -= 1
            return datetime.datetime(2020, 1, 1, cls.hour, tzinfo=zone)

    monkeypatch.setattr(progress, "datetime", Clock)
    trainer, _ = attached(tmp_path)
    trainer.run(batches(1), max_epochs=4)
    times = [entry.time for entry in Index(tmp_path).entries]
    assert times == sorted(times, reverse=True)
    for age, path in enumerate(sorted(tmp_path.glob("*.pt"))):
        os.utime(path, (1e9 - age, 1e9 - age))
    lose(tmp_path, index)
    assert [step for step, _ in order(tmp_path)] == [1, 2, 3, 4]
    _, checkpoints = attached(tmp_path)
    assert checkpoints.resume() == tmp_path / "step-00000004.pt"


@LOST
def test_a_step_that_is_saved_again_is_the_newest(tmp_path, index):
    trainer, checkpoints = attached(tmp_path)
    trainer.run(batches(1), max_epochs=3)
    for _ in range(3):
        checkpoints.save()
    lose(tmp_path, index)
    assert order(tmp_path) == [(1, 1), (2, 2), (3, 6)]


# -- files of earlier versions, whose number is a time --------------------------------------------------------------------


def write_earlier(folder, steps, *, listed):
    """Checkpoints as earlier versions wrote them, in this order; their times go back."""
    folder.mkdir(exist_ok=True)
    entries = []
    for age, step in enumerate(steps):
        entry = vars(Entry(file_name(step), step, step, 1, written=10**18 - age))
        save_durably({"phases": {}, "rotation": {"identity": "a", "entry": entry}, "x": torch.zeros(1)}, folder / entry["file"])
        entries.append(dict(entry))
    content = {"format": 1, "identity": "a", "checkpoints": entries[:listed]}
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (folder / "checkpoints.json").write_text(json.dumps(content | {"crc32": crc32}))


@pytest.mark.parametrize(
    ("steps", "listed", "expected"),
    [
        ([1, 2, 3], 3, [1, 2, 3]),
        ([1, 2, 3], 2, [1, 2, 3]),
        ([1, 2, 3], 0, [1, 2, 3]),
        ([1, 4, 2], 3, [1, 4, 2]),
        ([5, 6, 1, 2], 4, [5, 6, 1, 2]),
    ],
)
def test_those_of_earlier_versions_keep_the_order_of_the_index_and_else_that_of_their_steps(tmp_path, steps, listed, expected):
    write_earlier(tmp_path, steps, listed=listed)
    assert [step for step, _ in order(tmp_path)] == expected


@pytest.mark.parametrize("number", [1, 2, 7])
@LOST
def test_every_new_save_is_newer_than_those_of_earlier_versions(tmp_path, number, index):
    write_earlier(tmp_path / "earlier", [8, 9], listed=2)
    trainer, checkpoints = attached(tmp_path / "run")
    for _ in range(number):
        trainer.run(batches(1), max_epochs=trainer.state.epoch + 1)
    checkpoints.detach()
    for path in (tmp_path / "earlier").glob("*.pt"):
        content = load_checked(path)
        content["rotation"]["identity"] = json.loads((tmp_path / "run" / "checkpoints.json").read_text())["identity"]
        save_durably(content, tmp_path / "run" / path.name)
    lose(tmp_path / "run", index)
    assert [step for step, _ in order(tmp_path / "run")] == [8, 9, *range(1, number + 1)]


def test_numbers_never_reach_those_of_times(tmp_path):
    trainer, checkpoints = attached(tmp_path)
    checkpoints.writer.index.saves = EARLIEST_TIME - 2
    trainer.run(batches(1), max_epochs=3)
    assert [step for step, _ in order(tmp_path)] == [1, 2, 3]


def test_a_copied_folder_goes_on_counting(tmp_path):
    trainer, _ = attached(tmp_path / "run")
    trainer.run(batches(1), max_epochs=2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    trainer, checkpoints = attached(tmp_path / "copy")
    assert checkpoints.resume() == tmp_path / "copy" / "step-00000002.pt"
    trainer.run(batches(1), max_epochs=3)
    assert order(tmp_path / "copy") == [(1, 1), (2, 2), (3, 3)]
