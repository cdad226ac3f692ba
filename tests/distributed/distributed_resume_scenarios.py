"""Scenarios of runs that are stopped and resumed, compared with runs that are not."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from scenarios import (
    CLASSES,
    FEATURES,
    OUTPUT,
    UnsizedData,
    ddp,
    from_rank_zero,
    fsdp,
    full_weights,
    loader,
    max_difference,
    plain_model,
    rank,
    scenario,
    trainer_of,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from camshaft import CheckpointRotation, Events, create_trainer


def new_folder() -> Path:
    return Path(from_rank_zero(tempfile.mkdtemp(dir=OUTPUT) if rank() == 0 else None))


# -- a model with dropout, shuffled data ----------------------------------------------------------------------------------


def make_run(folder: Path, wrap: Any, **options: Any) -> tuple[Any, Any]:
    """A trainer and its checkpoints. The ranks draw different random numbers."""
    torch.manual_seed(1)
    model = wrap(nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES)).double())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = create_trainer(model, optimizer, nn.functional.cross_entropy, accumulation_steps=3)
    checkpoints = CheckpointRotation(folder, keep_last=1, **options).attach(trainer)
    torch.manual_seed(7 + rank())
    return trainer, checkpoints


def difference_after_resuming(stop: int, wrap: Any = ddp, **options: Any) -> float:
    """The difference between the weights of a run that was stopped after an iteration and resumed, and one that was not."""
    folder = new_folder()
    complete, _ = make_run(folder / "complete", wrap, **options)
    complete.run(loader(shuffle=True), max_epochs=2)
    stopped, _ = make_run(folder / "stopped", wrap, **options)
    if rank() == 0:
        stopped.add_event_handler(Events.ITERATION_COMPLETED(once=stop), stopped.terminate)
    stopped.run(loader(shuffle=True), max_epochs=2)
    resumed, checkpoints = make_run(folder / "stopped", wrap, **options)
    torch.manual_seed(99)
    assert checkpoints.resume("auto") is not None
    resumed.run(loader(shuffle=True), max_epochs=2)
    assert resumed.state.iteration == complete.state.iteration == 14
    return max_difference(full_weights(complete.primary.module), full_weights(resumed.primary.module))


@scenario()
def resumed_after_each_iteration() -> Any:
    return {stop: difference_after_resuming(stop) for stop in range(1, 14)}


@scenario()
def resumed_from_sharded_checkpoints() -> Any:
    return {stop: difference_after_resuming(stop, fsdp, sharded=True) for stop in (3, 6, 8, 10)}


@scenario()
def resumed_from_full_checkpoints_under_fsdp() -> Any:
    return {stop: difference_after_resuming(stop, fsdp) for stop in (3, 6, 8, 10)}


# -- another number of processes ------------------------------------------------------------------------------------------


@scenario()
def first_half_of_a_sharded_run() -> Any:
    """Leaves a checkpoint for another number of processes."""
    trainer, _ = make_run(OUTPUT / "first half", fsdp, sharded=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), trainer.terminate)
    trainer.run(loader(shuffle=True), max_epochs=2)
    return {"step": trainer.state.optimizer_step, **full_weights(trainer.primary.module)}


@scenario(1, 3, alone=True)
def second_half_of_a_sharded_run() -> Any:
    trainer, checkpoints = make_run(OUTPUT / "first half", fsdp, sharded=True)
    before = full_weights(trainer.primary.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoints.resume("auto")
    loaded = full_weights(trainer.primary.module)
    moments = trainer.primary.optimizers[0].state_dict()["state"][0]["exp_avg"]
    state = trainer.run(loader(shuffle=True), max_epochs=2)
    return {
        "change": max_difference(before, loaded),
        "moments": float(getattr(moments, "full_tensor", lambda: moments)().abs().sum()),
        "epoch": state.epoch,
        "iteration": state.iteration,
        "steps": state.optimizer_step,
        **loaded,
    }


# -- inside a window, and at the end of data of unknown length ------------------------------------------------------------


def difference_after_resuming_with(
    stop: int, make_model: Any, data: Any, after_resuming: Any = lambda model: None, **options: Any
) -> float:
    """The same difference for a model and data of one's own."""
    folder, weights = new_folder(), {}
    for part in ("complete", "stopped", "resumed"):
        torch.manual_seed(1)
        model = make_model()
        trainer = trainer_of(model, accumulation_steps=3)
        checkpoints = CheckpointRotation(folder / part.replace("resumed", "stopped"), **options).attach(trainer)
        if part == "stopped":
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), trainer.terminate)
        if part == "resumed":
            checkpoints.resume("auto")
            after_resuming(model)
        trainer.run(data(), max_epochs=3)
        weights[part] = full_weights(model)
    return max_difference(weights["complete"], weights["resumed"])


class AlternatingHalves(nn.Module):
    """Uses one of two layers; which one depends on the forward pass and on the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList(nn.Linear(FEATURES, CLASSES).double() for _ in range(2))
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.halves[(self.passes + rank()) % 2](x)


@scenario()
def resumed_with_gradients_that_differ_between_ranks() -> Any:
    def make_model() -> Any:
        return DistributedDataParallel(AlternatingHalves(), find_unused_parameters=True)

    def set_passes(model: Any) -> None:
        model.module.passes = 2

    return difference_after_resuming_with(2, make_model, lambda: list(loader()), set_passes)


@scenario()
def resumed_inside_a_window_under_fsdp() -> Any:
    """With data of unknown length, for which each backward pass reduces its gradients."""
    return {
        kind: difference_after_resuming_with(2, lambda: fsdp(plain_model()), lambda: UnsizedData(loader()), sharded=kind)
        for kind in (False, True)
    }


@scenario()
def resumed_after_an_epoch_that_one_rank_ended() -> Any:
    """The ranks have different numbers of batches, without a length."""

    def data() -> UnsizedData:
        return UnsizedData(list(loader())[: 5 + 2 * min(rank(), 1)])

    return {stop: difference_after_resuming_with(stop, lambda: ddp(plain_model()), data) for stop in (5, 10)}
