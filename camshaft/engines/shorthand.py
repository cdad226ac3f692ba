"""The arguments of the factories that are shorthand for attaching a handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from camshaft.engines.trainer import Trainer
from camshaft.handlers import GradientAccumulation, GradientClipping, LRScheduling, MixedPrecision

__all__ = ["attach_schedulers", "attach_settings"]


def attach_settings(
    trainer: Trainer,
    *,
    amp: str | torch.dtype | None,
    accumulation_steps: int,
    loss_weight: str | Callable[[Any], Any],
    partial_window: str,
    clip_grad_norm: float | None,
    clip_grad_value: float | None,
) -> None:
    """Attaches a handler for each argument that is not at its default."""
    if amp is not None:
        MixedPrecision(amp).attach(trainer)
    accumulation = GradientAccumulation(accumulation_steps, loss_weight=loss_weight, partial_window=partial_window)
    if (accumulation_steps, loss_weight, partial_window) != (1, "batch", "step"):
        accumulation.attach(trainer)
    if clip_grad_norm is not None or clip_grad_value is not None:
        GradientClipping(clip_grad_norm, clip_value=clip_grad_value).attach(trainer)
    trainer.release_by_handlers()


def attach_schedulers(trainer: Trainer, scheduler: Any, every: str, phase: str | None = None) -> None:
    """Attaches one scheduler, or a sequence of them.

    Args:
        trainer: the trainer.
        scheduler: the scheduler, a sequence of them, or ``None``.
        every: ``"step"`` or ``"epoch"``.
        phase: the phase whose optimizer they must schedule; any phase by default.

    Raises:
        ValueError: if a scheduler was made for the optimizer of another phase.
    """
    schedulers = () if scheduler is None else scheduler if isinstance(scheduler, (list, tuple)) else (scheduler,)
    for number, item in enumerate(schedulers, start=1):
        handler = LRScheduling(item, every=every).attach(trainer, scheduling_name(phase, number))
        handler.release_engine()
        if phase is not None and handler.phase != phase:
            raise ValueError(
                f"{phase}_scheduler ({type(item).__name__}) was made for the {handler.phase}'s optimizer; make it from "
                f"{phase}_optimizer"
            )


def scheduling_name(phase: str | None, number: int) -> str | None:
    """The name of the handler of a phase's n-th scheduler, under which checkpoints hold its state."""
    if phase is None:
        return None if number == 1 else f"LRScheduling{number}"
    return f"LRScheduling/{phase}" + (f"/{number}" if number > 1 else "")
