"""Gradient accumulation: several batches make one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from camshaft.handler import Handler

__all__ = ["GradientAccumulation"]


class GradientAccumulation(Handler):
    """Gathers the gradients of several batches before each optimizer step, as one big batch would have given them.

    It is a setting that the step itself reads: attaching sets it, detaching takes it back. A change takes effect when the
    next window opens.

    Args:
        steps: how many batches make a window.
        loss_weight: ``"batch"`` (each batch counts the same; bit for bit the hand-written ``loss / steps``), ``"samples"``
            (each sample does), or a function of the batch as the loader gave it that returns a number (its tokens).
        partial_window: what becomes of an epoch's last, shorter window: ``"step"`` makes a step, divided by the window's
            real length; ``"drop"`` throws it away.
        phase: the phase that it is for; all of them by default.

    Raises:
        ValueError: if a value isn't allowed.

    Example:
        >>> import torch
        >>> from camshaft import create_trainer
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
        >>> accumulation = GradientAccumulation(4, loss_weight="samples").attach(trainer)
    """

    needs_trainer = True

    def __init__(
        self,
        steps: int,
        *,
        loss_weight: str | Callable[[Any], Any] = "batch",
        partial_window: str = "step",
        phase: str | None = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"accumulation_steps must be a positive integer, got {steps!r}")
        if loss_weight not in ("batch", "samples") and not callable(loss_weight):
            raise ValueError(f"loss_weight must be 'batch', 'samples' or a function of the batch, got {loss_weight!r}")
        if partial_window not in ("step", "drop"):
            raise ValueError(f"partial_window must be 'step' or 'drop', got {partial_window!r}")
        self.steps, self.loss_weight, self.partial_window, self.phase = steps, loss_weight, partial_window, phase
        self._before: list[tuple[Any, Any]] = []

    def on_attach(self, engine: Any) -> None:
        """Sets each phase's window."""
        for phase in engine.phases_named(self.phase):
            window = phase.window
            self._before.append((window, window.settings))
            window.configure(self.steps, self.loss_weight, self.partial_window)

    def on_detach(self, engine: Any) -> None:
        """Sets each window back to what it was."""
        for window, before in self._before:
            window.configure(*before)
        self._before.clear()
