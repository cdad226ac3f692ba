"""Real runs on the disk, for the command line to look at."""

from pathlib import Path

import torch
from ignite.engine import Events
from toys import batches, linear, scripted, sgd, trainer_of

from camshaft import CheckpointRotation, EarlyStopping, Evaluation, LRHistory, TensorBoard

SCORES = [0.25, 0.75, 0.5, 0.5, 0.5]


def train(folder: Path, max_epochs=3, *, board=True, history=True, stop_at=None, patience=None, every=1, fail_at=None):
    """Trains a linear model on three batches an epoch; writes into ``folder`` and ``folder/checkpoints``."""
    model = linear()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    trainer = trainer_of(model, optimizer, scheduler=scheduler, clip_grad_norm=1.0)
    Evaluation(scripted(SCORES), [0]).attach(trainer)
    if patience is not None:
        EarlyStopping("val/score", patience=patience).attach(trainer)
    if history:
        LRHistory().attach(trainer)
    if board:
        TensorBoard(folder, every=every).attach(trainer)
    rotation = CheckpointRotation(folder / "checkpoints", keep_last=2, keep_best=1, metric="val/score").attach(trainer)
    if stop_at is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda engine: engine.terminate(reason="enough"))
    if fail_at is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=fail_at), fail)
    trainer.run(batches(3), max_epochs=max_epochs)
    return rotation


def fail():
    raise ValueError("broken")


def flip(path, at=0.5):
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def truncate(path, left=0.5):
    """Leaves the first part of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
