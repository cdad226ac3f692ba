"""A training run that gets signals; also a script: ``python signalled.py folder workers notes``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from ignite.metrics import Accuracy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft import (
    CheckpointRotation,
    Evaluation,
    Events,
    LRHistory,
    Priority,
    StopOnSignal,
    TensorBoard,
    create_evaluator,
    create_trainer,
    seed_everything,
)

BATCHES, WINDOW, EPOCHS = 13, 3, 3
STEPS = 5 * EPOCHS
"""An epoch has four full windows and a partial one of one batch."""


def data(size=BATCHES * 4):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))


def make_run(folder, *, workers=0, context=None, nested=False, every=Events.EPOCH_COMPLETED, before=lambda trainer: None):
    """A trainer with dropout, BatchNorm, a schedule and everything else that must survive a stop, and its run."""
    seed_everything(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=STEPS)
    trainer = create_trainer(model, optimizer, nn.functional.cross_entropy, accumulation_steps=WINDOW, scheduler=schedule)
    before(trainer)
    LRHistory().attach(trainer)
    TensorBoard(Path(folder) / "board", every=1).attach(trainer)
    StopOnSignal().attach(trainer)
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy()})
    times = Events.ITERATION_COMPLETED(every=4) if nested else Events.EPOCH_COMPLETED
    Evaluation(evaluator, DataLoader(data(12), batch_size=3), every=times).attach(trainer)
    rotation = CheckpointRotation(Path(folder) / "checkpoints", every=every).attach(trainer)
    loader = DataLoader(data(), batch_size=4, shuffle=True, num_workers=workers, multiprocessing_context=context)
    assert len(loader) == BATCHES
    return trainer, rotation, evaluator, lambda: trainer.run(loader, max_epochs=EPOCHS)


IN_EVALUATION = 1000
COMPLETED = 2000
"""Offsets of the reports from a nested evaluation, and from the end of the run."""


def train_slowly(report, folder, *, hang=None, pause=0.03, **options):
    """Reports each iteration, each batch of an evaluation, and the number of steps at the end."""
    trainer, rotation, evaluator, run = make_run(folder, **options)

    def tell(engine):
        report(engine.state.iteration)
        time.sleep(pause if engine.state.iteration != hang else 60)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, tell)
    if options.get("nested"):
        evaluator.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: (report(IN_EVALUATION + trainer.state.iteration), time.sleep(pause))
        )
    trainer.add_event_handler_at(
        Priority.USER, Events.COMPLETED, lambda engine: report(COMPLETED + engine.state.optimizer_step)
    )
    rotation.resume("auto")
    run()


def assert_same(one, other, path="state"):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, (dict, list, tuple)):
        assert len(one) == len(other), path
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same(one[key], other[key], f"{path}[{key!r}]")
    else:
        assert one == other, path


def end_of(trainer):
    """The state that training has produced."""
    kept = ("phases", "handlers", "rng")
    return {name: value for name, value in trainer.checkpoint().items() if name in kept}


def assert_resumes_exactly(folder, uninterrupted):
    trainer, rotation, _, run = make_run(folder)
    assert rotation.resume("auto") is not None
    run()
    assert_same(end_of(trainer), uninterrupted)


if __name__ == "__main__":
    notes = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND)
    train_slowly(lambda number: os.write(notes, b"%d\n" % number), sys.argv[1], workers=int(sys.argv[2]))
