"""A save that is killed before any one of its system calls: the newest complete checkpoint is always resumed."""

import itertools
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import traced
from faulty import LONG, Child, assert_of_one_step, counting_run, leftovers, train

from camshaft import CheckpointRotation
from camshaft.checkpoints.files import temporary_name
from camshaft.checkpoints.recovery import REPLACED

pytestmark = pytest.mark.skipif(not traced.can_trace(), reason="needs ptrace")

MEMORY = Path("/dev/shm")
STRIDE = 1 if LONG else 7
"""Tests every n-th system call that can change something; each test starts with another one."""
KINDS = {"file": {}, "background": {"background": True}, "sharded": {"sharded": True}}
KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def base(tmp_path):
    """A folder on a fast file system, if there is one."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


# -- what is killed, in a child process --------------------------------------------------------------------------------


def first_save(folder, **options):
    """The first save of a run, including the creation of the folder and its lock."""
    traced.arm()
    trainer, _ = counting_run(folder, keep_last=1, **options)
    train(trainer, 1)


def next_save(folder, **options):
    """Step 3 is saved, and then step 2 is deleted."""
    trainer, _ = counting_run(folder, keep_last=1, **options)
    train(trainer, 2)
    traced.arm()
    train(trainer, 3)


def same_step(folder, **options):
    """Step 2 is saved again, with a new metric."""
    trainer, rotation = counting_run(folder, keep_last=1, **options)
    train(trainer, 2)
    trainer.state.metrics["again"] = 1.0
    traced.arm()
    rotation.save()


def same_step_after_a_resume(folder, **options):
    """Step 2, which an earlier run saved, is resumed and saved again."""
    trainer, rotation = counting_run(folder, keep_last=1, **options)
    train(trainer, 2)
    rotation.detach()
    traced.arm()
    trainer, rotation = counting_run(folder, keep_last=1, **options)
    rotation.resume("auto")
    trainer.state.metrics["again"] = 1.0
    rotation.save()


def attach_after_a_kill_between_two_renames(folder, **options):
    """Step 2 was being replaced: the old and the new folder are complete, and neither has its name."""
    interrupt_between_renames(folder, **options)
    traced.arm()
    counting_run(folder, keep_last=1, **options)[1].resume("auto")


def interrupt_between_renames(folder, **options):
    """Leaves a folder as a kill between the two renames of a save of step 2 leaves it."""
    trainer, rotation = counting_run(folder, keep_last=1, **options)
    train(trainer, 2)
    shutil.copytree(rotation.last, folder / "copy")
    trainer.state.metrics["again"] = 1.0
    os.replace(rotation.save(), folder / temporary_name("step-00000002"))
    os.replace(folder / "copy", folder / temporary_name("step-00000002", REPLACED))
    rotation.detach()


SCENES = [first_save, next_save, same_step, same_step_after_a_resume]


def sweep(report, base, scene, start, options):
    """Reports each number of a call before which the scene was killed, each in a folder of its own."""
    trace, traced.arm = traced.arm, lambda: None
    scene(base / "warm" / "run", **options)  # imports everything, so that the forked processes are fast
    traced.arm = trace
    for number in itertools.count(start, STRIDE):
        (base / str(number)).mkdir()
        if not traced.killed_before(lambda number=number: scene(base / str(number) / "run", **options), number):
            break
        report(number)


# -- what is left ---------------------------------------------------------------------------------------------------------


def state_of(folder):
    """Every file with its size and the time of its last change."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def version(trainer, resumed):
    """The step that was resumed, and whether it is the one that was saved again; ``None`` for a fresh start."""
    return None if resumed is None else (assert_of_one_step(trainer), trainer.state.metrics.get("again", 0.0))


def found_by_a_reader(folder):
    """What an unattached rotation resumes from; it must not change the folder."""
    before = state_of(folder)
    trainer, rotation = counting_run(folder.with_name("elsewhere"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = CheckpointRotation(folder).resume("auto", trainer)
    assert CheckpointRotation(folder).last == resumed
    rotation.detach()
    assert state_of(folder) == before
    return version(trainer, resumed)


def found_by_the_owner(folder, **options):
    """What the next run resumes from. It must continue, rotate as usual, and leave no temporary files."""
    trainer, rotation = counting_run(folder, keep_last=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = rotation.resume("auto")
    found = version(trainer, resumed)
    train(trainer, 4)
    rotation.detach()
    assert [path.name for path in folder.glob("step-*")] == ["step-00000004" + ("" if "sharded" in options else ".pt")]
    assert [name for name in leftovers(folder) if not name.startswith("step-")] == []
    return found


def swept(base, tmp_path, scene, start, options):
    """What is found after each kill, in the order of the calls."""
    with Child(sweep, tmp_path / "notes", base, scene, start, options) as child:
        assert child.join() == 0, child.error()
        numbers = child.reported
    assert len(numbers) > 3
    found = []
    for number in numbers:
        folder = base / str(number) / "run"
        by_reader = found_by_a_reader(folder) if folder.exists() else None
        found.append(found_by_the_owner(folder, **options))
        assert by_reader == found[-1], f"before call {number}"
    return found


@KIND
@pytest.mark.parametrize(
    ("scene", "before", "after"),
    [
        (first_save, None, (1, 0.0)),
        (next_save, (2, 0.0), (3, 0.0)),
        (same_step, (2, 0.0), (2, 1.0)),
        (same_step_after_a_resume, (2, 0.0), (2, 1.0)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kill_before_each_system_call(base, tmp_path, kind, scene, before, after):
    start = 1 + (list(KINDS).index(kind) + SCENES.index(scene)) % STRIDE
    found = swept(base, tmp_path, scene, start, KINDS[kind])
    assert set(found) <= {before, after}
    assert found == sorted(found, key=lambda version: version == after), "an older version was found after a newer one"
    assert after in found or not LONG


def test_a_kill_before_each_system_call_of_a_recovery(base, tmp_path):
    found = swept(base, tmp_path, attach_after_a_kill_between_two_renames, 1, KINDS["sharded"])
    assert set(found) == {(2, 1.0)}
