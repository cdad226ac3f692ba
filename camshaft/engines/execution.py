"""Eager execution of a phase: one operation at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from camshaft.grad_norms import GradNorms
from camshaft.protocols import PhaseLike

__all__ = ["EagerExecution"]


class EagerExecution:
    """Runs the passes, the clipping and the optimizer step directly. ``camshaft.cudagraphs`` has the other way."""

    def forward_backward(self, phase: PhaseLike, engine: Any, prepared: Any, weight: Any) -> None:
        """Runs one batch forward and backward."""
        fire = engine.fire
        phase.forward(engine, prepared)
        fire.forward_completed()
        fire.backward_started()
        phase.backward(engine.state, weight)

    def inspect(
        self,
        phase: PhaseLike,
        settings: Hashable,
        given: list[torch.Tensor],
        check: Callable[[list[torch.Tensor], GradNorms], Any],
    ) -> Any:
        """Checks the gradients, and returns what it has found."""
        return check(given, phase.grad_norms)

    def clip(self, phase: PhaseLike, settings: Hashable, clip: Callable[[GradNorms], torch.Tensor]) -> torch.Tensor:
        """Clips the gradients, and returns the norm."""
        return clip(phase.grad_norms)

    def step(self, phase: PhaseLike) -> None:
        """Runs the step of the phase's optimizers."""
        for optimizer in phase.optimizers:
            optimizer.step()

    def after_step(self, phase: PhaseLike, settings: Hashable, written: list[torch.Tensor], work: Callable[[], None]) -> None:
        """Does some work with the new weights."""
        work()

    def check_event(self, event: Any) -> None:
        """Does nothing: every event fires."""

    def check_distributed(self) -> None:
        """Does nothing: it works with any number of processes."""

    def check_guards(self, phase: PhaseLike) -> None:
        """Does nothing: it takes nothing for granted."""

    def invalidate(self, phase: PhaseLike) -> None:
        """Does nothing: there is nothing cached."""

    def describe(self) -> str:
        """Nothing worth mentioning."""
        return ""
