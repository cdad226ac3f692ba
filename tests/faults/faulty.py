"""Runs to be killed, and child processes for them: forked from a server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from camshaft import CheckpointRotation, Events, Handler, LRHistory, Priority, create_trainer
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.lock import LOCK

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["camshaft", "pytest", "torch.utils.tensorboard", "torch._dynamo"])

TIMEOUT = 60
"""The longest time that a child may take for anything, in seconds."""

LONG = bool(os.environ.get("CAMSHAFT_LONG"))
"""Whether to run the long versions of the tests."""


class Ledger(Handler):
    """Records the number of every optimizer step."""

    saved = ("steps",)

    def __init__(self):
        self.steps = []

    def listeners(self):
        from camshaft.events import StepEvents
        from camshaft.handler import Listener

        yield Listener(StepEvents.OPTIMIZER_STEP_COMPLETED, self.note, Priority.USER)

    def note(self, engine):
        self.steps.append(engine.state.optimizer_step)


class Counting(nn.Module):
    """A model whose every weight equals the number of optimizer steps."""

    def __init__(self, size):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1))
        self.bulk = nn.Parameter(torch.zeros(size))
        self.last = nn.Parameter(torch.zeros(1))
        self.other = nn.Parameter(torch.zeros(3))


def count(model, batch):
    return -(model.first.sum() + model.bulk.sum() + model.last.sum()) + model.other.square().sum()


def counting_run(folder, *, size=10, **options):
    """A trainer of a :class:`Counting` model, with a rotation that saves after every step."""
    model = Counting(size)
    counted = torch.optim.SGD([model.first, model.bulk, model.last], lr=1.0)
    adam = torch.optim.Adam([model.other])
    trainer = create_trainer(model, [counted, adam], None, compute_loss=count)
    Ledger().attach(trainer)
    LRHistory().attach(trainer)
    options = {"keep_last": 2, "every": Events.ITERATION_COMPLETED} | options
    return trainer, CheckpointRotation(folder, **options).attach(trainer)


def train(trainer, steps):
    trainer.run([torch.zeros(1)] * 1000, max_iters=steps)


def assert_of_one_step(trainer):
    """Checks that weights, optimizers, clocks and handlers are all of the same step, and returns it."""
    step, model = trainer.state.optimizer_step, trainer.primary.module
    assert trainer.state.iteration == step
    for weight in (model.first, model.bulk, model.last):
        assert torch.equal(weight, torch.full_like(weight, step))
    assert int(trainer.primary.optimizers[1].state[model.other]["step"]) == step
    assert trainer.handlers["Ledger"].steps == list(range(1, step + 1))
    assert [at for at, _ in trainer.handlers["LRHistory"].history["lr/0"]] == list(range(1, step + 1))
    return step


def checkpoints(folder):
    """The steps of the checkpoints in a folder."""
    return sorted(int(path.stem.removeprefix("step-")) for path in Path(folder).glob("step-*.pt"))


def leftovers(folder):
    """The names in a folder that are not checkpoint files, the index or the lock."""
    return sorted(p.name for p in Path(folder).iterdir() if p.suffix != ".pt" and p.name not in ("checkpoints.json", LOCK))


def all_good(folder):
    """Whether every checkpoint in a folder is complete."""
    return all(load_checked(path) for path in Path(folder).glob("step-*.pt"))


# -- children ---------------------------------------------------------------------------------------------------------


class Child:
    """A child process that runs a function of a module and reports numbers through a file.

    Args:
        function: called in the child as ``function(report, *args)``; ``report(number)`` survives any kill.
        notes: the file of the reports.
    """

    def __init__(self, function, notes, *args, **kwargs):
        self.notes = Path(notes)
        self.notes.touch()
        self.process = CHILDREN.Process(target=_run_child, args=(function, self.notes, args, kwargs))
        self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()
        self.process.close()

    @property
    def reported(self):
        return [int(line) for line in self.notes.read_text().split("\n")[:-1]]

    def wait_for(self, number):
        """Waits until this number, or a higher one, has been reported."""
        deadline = time.monotonic() + TIMEOUT
        while not any(reported >= number for reported in self.reported):
            assert self.process.is_alive(), f"the child ended: {self.error()}"
            assert time.monotonic() < deadline, "the child timed out"
            time.sleep(0.002)

    def kill(self):
        self.process.kill()
        return self.join()

    def signal(self, number, group=False):
        (os.killpg if group else os.kill)(self.pid, number)

    def join(self):
        """Waits for the end of the process and returns the exit code, which is negative for a signal."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, "the child timed out"
        return self.process.exitcode

    def error(self):
        return self.notes.with_suffix(".error").read_text() if self.notes.with_suffix(".error").exists() else ""


def _run_child(function, notes, args, kwargs):
    os.setsid()  # a process group of its own, as in a terminal
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # autograd starts a thread for each GPU, and cannot run in forks after that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(notes, os.O_WRONLY | os.O_APPEND)
    error = os.open(notes.with_suffix(".error"), os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    try:
        function(lambda number: os.write(descriptor, b"%d\n" % number), *args, **kwargs)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
        raise SystemExit(1) from None


def save_every_step(report, folder, temporary=None, steps=100_000, **options):
    """Resumes, saves after every step, and reports the number of each step once it is saved."""
    if temporary is not None:
        os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
    trainer, rotation = counting_run(folder, **options)
    rotation.resume("auto")

    def report_last(engine):
        if rotation.last is not None:
            report(int(rotation.last.stem.removeprefix("step-")))

    trainer.add_event_handler_at(Priority.SAVE + 1, Events.ITERATION_COMPLETED, report_last)
    train(trainer, steps)
