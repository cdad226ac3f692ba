"""The batches whose gradients make one optimizer step, and what each of them weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch

from camshaft.pytree import describe, num_samples

__all__ = ["Window"]


class Window:
    """How many batches are gathered, how they are weighed, and how far the gathering has come.

    With ``loss_weight="batch"`` each loss is divided by the number of batches before it goes backward, exactly as a loop
    written by hand does it. With any other weight each loss is multiplied by its weight, and the gradients are divided
    once by the sum of the weights: what a single big batch would have given.

    Example:
        >>> window = Window()
        >>> window.configure(4)
        >>> window.open(left=2)  # the epoch has two batches left
        >>> window.length
        2
    """

    def __init__(self) -> None:
        self.batches = 0
        """The number of batches gathered; 0 where no window is open."""
        self.length = 1
        """The number of batches after which the open window closes."""
        self.weight: Any = 0.0
        """The sum of the weights gathered."""
        self.will_be_dropped = False
        """Whether the data ends before the open window is full, which will then be dropped."""
        self.configure()

    def configure(self, steps: int = 1, loss_weight: str | Callable[[Any], Any] = "batch", partial: str = "step") -> None:
        """Sets how many batches make a window, how they are weighed, and what becomes of a shorter last one.

        A window that is open ends as it began; the next one follows the new settings.
        """
        self._settings, self._changed = (steps, loss_weight, partial), True
        if self.batches == 0:
            self._apply()

    @property
    def settings(self) -> tuple[int, str | Callable[[Any], Any], str]:
        """Steps, weight and policy as last configured."""
        return self._settings

    def _apply(self) -> None:
        self._changed = False
        self.steps, self.loss_weight, self.partial = self._settings
        self.is_single_batch = self.steps == 1 and self.loss_weight == "batch"
        """Whether every batch is a window and its loss goes backward as it is."""

    def reset(self) -> None:
        """Ends the window, used or thrown away."""
        self.batches, self.weight = 0, 0.0
        if self._changed:
            self._apply()

    def open(self, left: float) -> None:
        """Begins a new window.

        Args:
            left: how many batches there are before the data is bound to stop; infinite where that isn't known.
        """
        short = left < self.steps and self.partial == "step"
        self.will_be_dropped = left < self.steps and not short
        self.length, self.weight = int(left) if short else self.steps, 0.0

    def count(self, weight: Any) -> None:
        """Notes that a batch of a weight has been gathered."""
        self.batches += 1
        if weight is not None:
            self.weight += weight

    def scale_loss(self, loss: torch.Tensor, weight: Any) -> torch.Tensor:
        """What of a batch's loss goes backward: its part of the window's mean, or its weight times the loss."""
        if weight is None:
            return loss if self.length == 1 else loss / self.length
        share: torch.Tensor = loss * weight
        return share

    def batch_weight(self, batch: Any) -> Any:
        """The weight of a batch, a number on the host or a scalar tensor; ``None`` where each counts the same.

        Raises:
            TypeError: where samples are to be counted and the batch has no tensor with a length.
            ValueError: where the user's function gives no finite number of at least 0.
        """
        if self.loss_weight == "batch":
            return None
        if callable(self.loss_weight):
            return checked_weight(self.loss_weight(batch), self.loss_weight)
        weight = num_samples(batch)
        if weight is None:
            raise TypeError(
                f"loss_weight='samples' needs a tensor with a length in the batch, got {describe(batch)}; "
                "pass a function of the batch as loss_weight"
            )
        return weight

    def divisor(self, alone: bool = True) -> Any:
        """What the gathered gradients have yet to be divided by; ``None`` where they are true as they are.

        Args:
            alone: whether no other process gathers for the same window.

        Raises:
            ValueError: where all batches of the window weigh nothing.
        """
        if self.loss_weight == "batch":  # divided on the way, unless the window came out shorter than planned
            return None if self.batches == self.length else self.batches / self.length
        if alone and not isinstance(self.weight, torch.Tensor) and self.weight == 0:
            raise ValueError("every batch of this window weighs 0 by loss_weight: its mean loss is not defined")
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        """The open window's numbers."""
        return {"batches": self.batches, "length": self.length, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with a window that was open."""
        self.batches, self.length, self.weight = state["batches"], state["length"], state["weight"]


def checked_weight(weight: Any, function: Callable[[Any], Any]) -> Any:
    """A weight from a user's function: a number, or a scalar tensor that stays on its device so that nothing waits."""
    if isinstance(weight, torch.Tensor) and weight.numel() == 1:
        if weight.device.type != "cpu":
            return weight.detach().reshape(())
        weight = float(weight)
    if not isinstance(weight, Real) or not 0 <= float(weight) < float("inf"):
        name = getattr(function, "__qualname__", repr(function))
        raise ValueError(f"loss_weight ({name}) must give a finite number of at least 0, got {weight!r}")
    return float(weight)
