"""Several processes and one folder: one writes, the others are rejected or only read."""

import itertools
import os
import random
import signal
import time
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from faulty import LONG, TIMEOUT, Child, assert_of_one_step, checkpoints, counting_run, leftovers, save_every_step, train
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from camshaft import CheckpointRotation, Events, create_trainer
from camshaft.checkpoints import writer
from camshaft.checkpoints.lock import LOCK, FolderInUseError
from camshaft.cli.integrity import check_folder
from camshaft.distributed.collectives import world_size

SIZE = 50_000
SECONDS = 60 if LONG else 4


def hold(report, folder):
    """Attaches, and waits for a signal."""
    _, rotation = counting_run(folder)
    report(1)
    time.sleep(TIMEOUT)
    rotation.detach()


def attach_and_detach(report, folder):
    """Reports 1 if the folder can be taken, 2 if it is in use."""
    try:
        counting_run(folder)[1].detach()
        report(1)
    except FolderInUseError:
        report(2)


def can_attach(folder, notes):
    """Whether another process can take the folder now."""
    with Child(attach_and_detach, notes, folder) as child:
        assert child.join() == 0, child.error()
        return child.reported[-1] == 1


# -- a second writer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"background": True}, {"sharded": True}], ids=["file", "background", "sharded"])
def test_a_second_run_is_rejected_and_changes_nothing(tmp_path, options):
    folder = tmp_path / "run"
    with Child(save_every_step, tmp_path / "notes", folder, size=SIZE, **options) as child:
        child.wait_for(3)
        (folder / ".camshaft-of-the-first.tmp").write_bytes(b"what a save would be writing")
        for _ in range(20):
            with pytest.raises(FolderInUseError, match=rf"run is in use: process {child.pid} on host .*give this one another"):
                counting_run(folder, size=SIZE)
        assert (folder / ".camshaft-of-the-first.tmp").exists()
        child.wait_for(max(child.reported) + 3)


def test_a_stopped_process_still_owns_its_folder(tmp_path):
    folder = tmp_path / "run"
    with Child(hold, tmp_path / "notes", folder) as child:
        child.wait_for(1)
        child.signal(signal.SIGSTOP)
        with pytest.raises(FolderInUseError, match=f"process {child.pid}"):
            counting_run(folder)
        child.signal(signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_the_folder_of_a_dead_process_is_free_at_once(tmp_path, number):
    folder = tmp_path / "run"
    with Child(hold, tmp_path / "notes", folder) as child:
        child.wait_for(1)
        child.signal(number)
        child.join()
        assert (folder / LOCK).exists()
        trainer, _ = counting_run(folder)
    train(trainer, 2)
    assert checkpoints(folder) == [1, 2]


# -- forked processes -----------------------------------------------------------------------------------------------------


def fork_and_die(report, folder):
    """Forks a process, and is killed before it."""
    counting_run(folder)
    if os.fork() == 0:
        time.sleep(TIMEOUT)
        os._exit(0)
    report(1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_process_that_outlives_the_run_does_not_keep_the_folder(tmp_path):
    folder = tmp_path / "run"
    with Child(fork_and_die, tmp_path / "notes", folder) as child:
        assert child.join() == -signal.SIGKILL
        try:
            counting_run(folder)
        finally:
            os.killpg(child.pid, signal.SIGKILL)


@pytest.mark.parametrize("clean", ["garbage collection", "detach", "exit"])
def test_a_forked_process_can_not_release_the_lock(tmp_path, clean):
    folder = tmp_path / "run"
    trainer, rotation = counting_run(folder)
    pid = os.fork()
    if pid == 0:
        if clean == "detach":
            rotation.detach()
        elif clean == "garbage collection":
            del trainer.handlers["CheckpointRotation"], rotation, trainer
        os._exit(0)
    os.waitpid(pid, 0)
    assert not can_attach(folder, tmp_path / "notes")
    train(trainer, 2)
    assert checkpoints(folder) == [1, 2]


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_the_workers_of_a_loader_neither_break_nor_keep_the_lock(tmp_path, context):
    folder = tmp_path / "run"
    trainer, rotation = counting_run(folder, every=Events.EPOCH_COMPLETED)
    loader = DataLoader(torch.zeros(6, 1), num_workers=2, multiprocessing_context=context, persistent_workers=True)
    trainer.run(loader, max_epochs=2)
    assert not can_attach(folder, tmp_path / "notes")
    rotation.detach()  # the workers are still alive
    assert can_attach(folder, tmp_path / "notes")


# -- several ranks --------------------------------------------------------------------------------------------------------


@contextmanager
def two_ranks(rank, rendezvous):
    """A process group, as ``torchrun`` and ``init_process_group`` make it."""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    world_size()  # every rank makes a trainer
    yield
    dist.barrier()
    dist.destroy_process_group()


def attach_as_rank(report, rank, folder, rendezvous):
    """Reports 1 if the folder can be taken, 2 if this rank gets the error that it is in use."""
    with two_ranks(rank, rendezvous):
        attach_and_detach(report, folder)
        attach_and_detach(report, folder.with_name("free"))


def attach_on_rank_zero_alone(report, rank, folder, rendezvous):
    """As in ``if rank == 0: rotation.attach(trainer)``."""
    with two_ranks(rank, rendezvous):
        if rank == 0:
            attach_and_detach(report, folder.with_name("free"))


def fail_to_save(report, rank, folder, rendezvous, options):
    """Every save after the first runs out of memory on rank 0. Each rank reports 1 if it raises that, and the iteration."""
    with two_ranks(rank, rendezvous):
        model = DistributedDataParallel(torch.nn.Linear(1, 1))
        trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
        rotation = CheckpointRotation(folder, every=Events.ITERATION_COMPLETED, **options).attach(trainer)
        rotation.save()
        if rank == 0:
            writer.save_durably = run_out_of_memory
        try:
            trainer.run([(torch.zeros(1, 1), torch.zeros(1, 1))] * 20)
        except RuntimeError as error:
            report(1 if "no memory" in str(error) and "3 saves in a row have failed" in str(error) else 2)
            report(trainer.state.iteration)


def run_out_of_memory(content, path):
    raise MemoryError("no memory")


def on_two_ranks(function, folder, tmp_path, *more):
    """The reports of two ranks."""
    arguments = folder, tmp_path / "rendezvous", *more
    with Child(function, tmp_path / "0", 0, *arguments) as first, Child(function, tmp_path / "1", 1, *arguments) as second:
        assert (first.join(), second.join()) == (0, 0), first.error() + second.error()
        return first.reported, second.reported


def test_every_rank_raises_if_the_folder_is_in_use(tmp_path):
    _, rotation = counting_run(tmp_path / "run")
    assert on_two_ranks(attach_as_rank, tmp_path / "run", tmp_path) == ([2, 1], [2, 1])
    rotation.detach()


@pytest.mark.parametrize(("options", "iteration"), [({}, 3), ({"background": True}, 4)], ids=["file", "background"])
def test_every_rank_raises_if_saves_fail(tmp_path, options, iteration):
    assert on_two_ranks(fail_to_save, tmp_path / "run", tmp_path, options) == ([1, iteration], [1, iteration])
    assert checkpoints(tmp_path / "run") == [0]


def test_rank_zero_does_not_wait_for_ranks_that_do_not_attach(tmp_path):
    assert on_two_ranks(attach_on_rank_zero_alone, tmp_path / "run", tmp_path) == ([1], [])


# -- readers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sharded": True}], ids=["file", "sharded"])
def test_a_reader_next_to_a_run(tmp_path, options):
    """The reader always finds a complete checkpoint, at least as new as the last report; the run is not disturbed."""
    folder, seen = tmp_path / "run", []
    with Child(save_every_step, tmp_path / "notes", folder, size=SIZE, keep_last=1, **options) as child:
        child.wait_for(2)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            reported = max(child.reported)
            trainer, other = counting_run(tmp_path / "other", size=SIZE)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*passed over")
                CheckpointRotation(folder).resume("auto", trainer)
            other.detach()
            assert check_folder(folder).bad == []
            assert assert_of_one_step(trainer) >= reported
            seen.append(trainer.state.optimizer_step)
        assert child.process.is_alive(), child.error()
    assert len(seen) > 5
    assert seen == sorted(seen)


def save_one_step_again(report, folder, **options):
    """Saves step 2 over and over, each time with a new number in it, which is reported afterwards."""
    trainer, rotation = counting_run(folder, keep_last=1, **options)
    train(trainer, 2)
    for number in itertools.count(1):
        trainer.state.metrics["again"] = float(number)
        assert rotation.save() is not None
        report(number)


@pytest.mark.parametrize("options", [{}, {"background": True}, {"sharded": True}], ids=["file", "background", "sharded"])
def test_a_reader_of_a_step_that_is_saved_again_and_again(tmp_path, options):
    """Every save replaces the only checkpoint; the reader finds the old one or the new one, and never nothing."""
    folder, seen = tmp_path / "run", []
    with Child(save_one_step_again, tmp_path / "notes", folder, size=SIZE, **options) as child:
        child.wait_for(1)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            reported = max(child.reported)
            trainer, other = counting_run(tmp_path / "other", size=SIZE)
            assert CheckpointRotation(folder).resume("auto", trainer) is not None
            assert CheckpointRotation(folder).last is not None
            other.detach()
            assert check_folder(folder).bad == []
            assert assert_of_one_step(trainer) == 2
            assert trainer.state.metrics["again"] >= reported
            seen.append(trainer.state.metrics["again"])
        assert child.process.is_alive(), child.error()
    assert len(seen) > 5
    assert seen == sorted(seen)


def write_again_and_again(report, folder, notes_of_all, **options):
    """Tries to take the folder; then resumes and saves every step."""
    while True:
        try:
            save_every_step(report, folder, **options)
        except FolderInUseError:
            time.sleep(0.01)


@pytest.mark.parametrize("options", [{}, {"background": True}, {"sharded": True}], ids=["file", "background", "sharded"])
def test_two_writers_a_reader_and_a_killer(tmp_path, options):
    """Nothing that was reported as saved is lost, whichever writer is killed."""
    folder, draw = tmp_path / "run", random.Random(len(options))
    options = {"size": SIZE, "keep_last": 1, **options}
    notes = [tmp_path / "0", tmp_path / "1"]
    start = lambda number: Child(write_again_and_again, notes[number], folder, None, **options)  # noqa: E731
    writers = [start(0), start(1)]
    deadline, kills, best = time.monotonic() + SECONDS, 0, 0
    try:
        while time.monotonic() < deadline:
            time.sleep(draw.uniform(0.05, 0.4))
            best = max([best, *writers[0].reported, *writers[1].reported])
            trainer, other = counting_run(tmp_path / "other", size=SIZE)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*passed over")
                found = CheckpointRotation(folder).resume("auto", trainer)
            other.detach()
            assert not folder.exists() or check_folder(folder).bad == []
            assert found is not None or best == 0
            assert best == 0 or assert_of_one_step(trainer) >= best
            victim = draw.randrange(2)
            assert writers[victim].process.is_alive(), writers[victim].error()
            writers[victim].__exit__()
            writers[victim], kills = start(victim), kills + 1
    finally:
        for writer in writers:
            writer.__exit__()
    best = max([best, *(int(line) for path in notes for line in path.read_text().split("\n")[:-1])])
    trainer, rotation = counting_run(folder, **options)
    rotation.resume("auto")
    assert assert_of_one_step(trainer) >= best > 0
    assert kills > 3
    assert [name for name in leftovers(folder) if not name.startswith("step-")] == []
