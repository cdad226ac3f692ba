"""Gradient accumulation: several batches make one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from camshaft.handler import Handler
from camshaft.validation import check_count

__all__ = ["GradientAccumulation"]


class GradientAccumulation(Handler):
    """Accumulates the gradients of several batches for each optimizer step; the result equals that of one big batch.

    It is a setting that the step itself reads: attaching sets it, detaching removes it. A change takes effect with the next
    window.

    Args:
        steps: the number of batches in a window.
        loss_weight: ``"batch"`` (each batch counts the same; bit for bit the hand-written ``loss / steps``), ``"samples"``
            (each sample counts the same), or a function of the batch that returns its weight (its number of tokens, say).
        partial_window: what to do with an epoch's last, shorter window: ``"step"`` makes a step, divided by the actual
            length; ``"drop"`` discards it.
        phase: the phase it applies to; all of them by default.

    Raises:
        ValueError: if a value is not allowed.

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
        if loss_weight not in ("batch", "samples") and not callable(loss_weight):
            raise ValueError(f"loss_weight must be 'batch', 'samples' or a function of the batch, got {loss_weight!r}")
        if partial_window not in ("step", "drop"):
            raise ValueError(f"partial_window must be 'step' or 'drop', got {partial_window!r}")
        self.steps = check_count(steps, "accumulation_steps")
        self.loss_weight, self.partial_window, self.phase = loss_weight, partial_window, phase
        self._before: list[tuple[Any, Any]] = []

    def on_attach(self, engine: Any) -> None:
        """Configures the window of each phase."""
        for phase in engine.phases_named(self.phase):
            window = phase.window
            self._before.append((window, window.settings))
            window.configure(self.steps, self.loss_weight, self.partial_window)

    def on_detach(self, engine: Any) -> None:
        """Restores the settings of each window."""
        for window, before in self._before:
            window.configure(*before)
        self._before.clear()
