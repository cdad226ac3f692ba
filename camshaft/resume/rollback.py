"""Loading a checkpoint is all or nothing: after an error the trainer is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from camshaft.distributed.dtensors import is_dtensor
from camshaft.models import unwrap
from camshaft.validation import add_note, stateful

__all__ = ["all_or_nothing"]

Undo = Callable[[], None]

STATE_FIELDS = ("iteration", "epoch", "epoch_length", "max_epochs", "max_iters", "epoch_is_open", "optimizer_step",
                "skipped_steps", "losses", "x", "y")  # fmt: skip
TRAINER_FIELDS = ("epoch_iteration", "last_batch", "unclaimed", "should_terminate", "should_terminate_single_epoch",
                  "_internal_run_generator", "_dataloader_iter", "_init_iter")  # fmt: skip
PHASE_FIELDS = ("optimizer_step", "skipped_steps", "forward_passes")


@contextmanager
def all_or_nothing(trainer: Any) -> Iterator[None]:
    """Undoes what the block has changed of a trainer if it raises.

    For that the weights are copied to the host; sharded tensors and the states of handlers (the weights of an EMA) are copied
    on their device. An optimizer replaces its state when it loads another, so that a reference to the old one is enough.
    """
    undos = [undo_handler(handler) for handler in trainer.handlers.values()]
    for phase in trainer.phases.values():
        undos += undo_phase(phase)
    undos += [
        undo_fields(trainer.state, STATE_FIELDS),
        undo_fields(trainer, TRAINER_FIELDS),
        undo_metrics(trainer.state.metrics),
    ]
    length_is_learned = trainer.run_state.length_is_learned
    try:
        yield
    except BaseException as error:
        trainer.run_state.length_is_learned = length_is_learned
        for undo in undos:
            try:
                undo()
            except Exception as second:  # the first error is the one to report
                add_note(error, f"camshaft: the trainer may be partly restored: {second!r}")
        raise


def undo_fields(owner: Any, names: tuple[str, ...]) -> Undo:
    """Restores some attributes."""
    values = {name: getattr(owner, name) for name in names}

    def undo() -> None:
        for name, value in values.items():
            setattr(owner, name, value)

    return undo


def undo_metrics(metrics: Any) -> Undo:
    """Restores ``state.metrics``, which counts how often it is written."""
    values = dict(metrics)

    def undo() -> None:
        metrics.clear()
        metrics.recall(values)

    return undo


def undo_handler(handler: Any) -> Undo:
    """Restores the state of a handler; one that has no state to save has none to lose."""
    try:
        state = copy.deepcopy(handler.state_dict())
    except (AttributeError, TypeError):  # a checkpoint can't carry it: saving will say so
        return lambda: None
    return lambda: handler.load_state_dict(state)


def undo_phase(phase: Any) -> list[Undo]:
    """Restores the weights, optimizers, scaler, window and counters of a phase."""
    window, gradients = dict(vars(phase.window)), [p.grad for p in phase.parameters()]
    scaler = copy.deepcopy(phase.precision.state_dict())
    modules = [module for module in (unwrap(phase.module), stateful(phase.objective)) if module is not None]

    def undo_window() -> None:
        vars(phase.window).update(window)
        phase.precision.load_state_dict(scaler)
        for parameter, gradient in zip(phase.parameters(), gradients, strict=True):
            parameter.grad = gradient
        phase.execution.invalidate(phase)

    return [
        *(undo_optimizer(optimizer) for optimizer in phase.optimizers),
        *(undo_module(module) for module in modules),
        undo_fields(phase, PHASE_FIELDS),
        undo_window,
    ]


def undo_optimizer(optimizer: Optimizer) -> Undo:
    """Restores the state and the parameter groups of an optimizer."""
    state, groups = optimizer.state, optimizer.param_groups
    states = {key: dict(values) if isinstance(values, dict) else values for key, values in state.items()}
    settings = [dict(group) for group in groups]

    def undo() -> None:
        state.clear()
        state.update(states)
        for group, values in zip(groups, settings, strict=True):
            group.clear()
            group.update(values)
        optimizer.state, optimizer.param_groups = state, groups

    return undo


def undo_module(module: nn.Module) -> Undo:
    """Restores the weights and buffers of a module."""
    state = {name: to_host(value) for name, value in module.state_dict().items()}

    def undo() -> None:
        module.load_state_dict(state)

    return undo


def to_host(value: Any) -> Any:
    """A copy of a value, on the host if it is a tensor (unless it is sharded)."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    return value.detach().clone() if is_dtensor(value) else value.detach().to("cpu", copy=True)
