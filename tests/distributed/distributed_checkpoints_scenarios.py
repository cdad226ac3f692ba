"""Scenarios of writing checkpoints on several ranks."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scenarios import (
    FEATURES,
    OUTPUT,
    ddp,
    error_of,
    fsdp,
    fully_shard,
    is_last_rank,
    loader,
    plain_model,
    raise_on_every_rank,
    rank,
    scenario,
    trainer_of,
)
from torch import nn

import camshaft.checkpoints.sharded_save
from camshaft import CheckpointRotation, Events, create_evaluator


@scenario()
def checkpoints_at_the_start_of_each_epoch() -> Any:
    """The iterations of the checkpoints that exist when each epoch begins, for two events that request them."""
    requested = {"epochs": Events.EPOCH_COMPLETED, "iterations": Events.ITERATION_COMPLETED(every=5)}
    return {name: saved_iterations(OUTPUT / f"saved-{name}", every) for name, every in requested.items()}


def saved_iterations(folder: Path, every: Any) -> list[list[int]]:
    trainer = trainer_of(ddp(plain_model()))
    checkpoints = CheckpointRotation(folder, keep_last=9, every=every).attach(trainer)
    seen: list[list[int]] = []

    def look() -> None:
        seen.append([entry.iteration for entry in checkpoints.index.entries])

    trainer.add_event_handler(Events.EPOCH_STARTED, look)
    trainer.run(loader(), max_epochs=3)
    look()
    return seen


@scenario()
def saved_in_the_background() -> Any:
    trainer = trainer_of(ddp(plain_model()))
    checkpoints = CheckpointRotation(OUTPUT / "background", background=True).attach(trainer)
    trainer.run(loader())
    return str(checkpoints.last)


@scenario()
def saved_on_an_exception() -> Any:
    trainer = trainer_of(ddp(plain_model()))
    checkpoints = CheckpointRotation(OUTPUT / "on an exception").attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), raise_on_every_rank)
    errors = []
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: errors.append(error_of(checkpoints.save)))
    error_of(lambda: trainer.run(loader()))
    return errors[0]


@scenario()
def saved_inside_a_window_under_fsdp() -> Any:
    trainer, errors = trainer_of(fsdp(plain_model()), accumulation_steps=4), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: errors.append(error_of(trainer.checkpoint)))
    trainer.run(loader())
    return errors[0]


@scenario()
def checksums_that_fail_on_one_rank() -> Any:
    """The last rank cannot read what it has written."""
    folder, true_checksum = OUTPUT / "checksums", camshaft.checkpoints.sharded_save.checksum

    def checksum(path: Any) -> int:
        if is_last_rank():
            raise OSError(5, "Input/output error", str(path))
        return true_checksum(path)

    trainer = trainer_of(fsdp(plain_model()))
    CheckpointRotation(folder, sharded=True).attach(trainer)
    with mock.patch.object(camshaft.checkpoints.sharded_save, "checksum", checksum):
        error = error_of(lambda: trainer.run(loader(), max_epochs=2))
    return {"error": error, "folders left": sorted(path.name for path in folder.iterdir() if path.is_dir())}


@scenario()
def batch_norm_statistics() -> Any:
    """The running mean, which differs between ranks, before and after a checkpoint is loaded, and after an evaluation."""
    torch.manual_seed(1)
    model = fully_shard(nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 3)).double())
    trainer = trainer_of(model)
    checkpoints = CheckpointRotation(OUTPUT / "statistics", sharded=True).attach(trainer)
    trainer.run(loader())
    means = {"own": model[0].running_mean.clone()}
    checkpoints.resume(checkpoints.last)
    means["loaded"] = model[0].running_mean.clone()
    with torch.no_grad():
        model[0].running_mean.add_(rank())
    create_evaluator(model).run(loader())
    return means | {"evaluated": model[0].running_mean.clone()}
