"""A process that is killed during a save loses nothing that it has saved before."""

import os
import random
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from faulty import LONG, Child, all_good, assert_of_one_step, checkpoints, counting_run, leftovers, save_every_step, train

from camshaft import Events

KILLS = 200 if LONG else 12
SIZE = 150_000
RENAMED = 3
"""The third file operation of a save renames the file; from then on, the new checkpoint is the newest."""
MEMORY = Path("/dev/shm")


def start_again(folder, **options):
    """Attaches and resumes as the next run does: without a warning, in a clean folder."""
    trainer, rotation = counting_run(folder, **options)
    assert leftovers(folder) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = rotation.resume("auto")
    return trainer, rotation, resumed


def kill_while_saving(folder, notes, kills, seed, **options):
    """Kills children that save, each at a random moment; after each kill, every checkpoint must be complete and consistent."""
    draw, saved = random.Random(seed), 0
    for _ in range(kills):
        with Child(save_every_step, notes, folder, size=SIZE, **options) as child:
            child.wait_for(saved + 1)
            child.process.join(draw.uniform(0, 0.06))
            assert child.kill() == -signal.SIGKILL, child.error()
            reported = max(child.reported)
        trainer, rotation, resumed = start_again(folder, size=SIZE)
        step = assert_of_one_step(trainer)
        assert step >= reported, f"step {reported} was saved, but {resumed} was resumed"
        assert rotation.last == resumed
        assert all_good(folder)
        rotation.detach()  # the next child owns the folder
        saved = step
    return saved


@pytest.mark.parametrize("keep_last", [1, 3])
def test_kill_9_while_saving(tmp_path, keep_last):
    folder = tmp_path / "run"
    assert kill_while_saving(folder, tmp_path / "notes", KILLS // 2, seed=keep_last, keep_last=keep_last) > KILLS // 2


def test_kill_9_while_saving_in_the_background(tmp_path):
    kill_while_saving(tmp_path / "run", tmp_path / "notes", KILLS // 2, seed=5, background=True)


@pytest.fixture
def memory():
    """A folder on a file system in memory."""
    if not MEMORY.is_dir():
        pytest.skip("needs /dev/shm")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_kill_9_while_saving_with_the_temporary_folder_on_another_file_system(tmp_path, memory):
    assert memory.stat().st_dev != tmp_path.stat().st_dev
    kill_while_saving(tmp_path / "run", tmp_path / "notes", KILLS // 2, seed=7, temporary=memory)
    assert list(memory.rglob(".camshaft-*")) == []


def test_the_checkpoints_of_a_killed_run_are_rotated(tmp_path):
    folder = tmp_path / "run"
    kill_while_saving(folder, tmp_path / "notes", 3, seed=11)
    trainer, _, _ = start_again(folder, size=SIZE)
    step = trainer.state.optimizer_step
    train(trainer, step + 2)
    assert checkpoints(folder) == [step + 1, step + 2]


def die_before_operation(report, folder, number, killed=3):
    """Saves every step, and is killed in the save of step ``killed``, before its file operation ``number``."""
    operations = 0

    def note(*_):
        nonlocal operations
        operations += 1
        if operations == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove") and str(folder) in str(arguments[0]):
            note()

    def arm(engine):
        fsync = os.fsync
        os.fsync = lambda descriptor: (note(), fsync(descriptor))[1]
        sys.addaudithook(hook)

    trainer, _ = counting_run(folder, keep_last=1)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=killed), arm)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: report(engine.state.iteration))
    train(trainer, killed)


@pytest.mark.parametrize("number", range(1, 12))
def test_kill_before_each_file_operation_of_a_save(tmp_path, number):
    folder = tmp_path / "run"
    with Child(die_before_operation, tmp_path / "notes", folder, number) as child:
        assert child.join() == -signal.SIGKILL, child.error()
        assert child.reported == [1, 2, 3]
    trainer, rotation, resumed = start_again(folder, keep_last=1)
    assert assert_of_one_step(trainer) == (2 if number <= RENAMED else 3)
    assert rotation.last == resumed
    train(trainer, 5)
    assert checkpoints(folder) == [5]


def test_a_checkpoint_that_is_missing_from_the_index_is_the_newest(tmp_path):
    train(counting_run(tmp_path)[0], 3)
    before = (tmp_path / "checkpoints.json").read_bytes()
    trainer, rotation = counting_run(tmp_path)
    rotation.resume("auto")
    train(trainer, 4)
    (tmp_path / "checkpoints.json").write_bytes(before)
    trainer, rotation, resumed = start_again(tmp_path)
    assert resumed == rotation.last == tmp_path / "step-00000004.pt"
    assert assert_of_one_step(trainer) == 4
