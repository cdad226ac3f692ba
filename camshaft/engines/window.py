"""The batches whose gradients make one optimizer step, and the weight of each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch

from camshaft.pytree import describe, num_samples

__all__ = ["Window"]


class Window:
    """Counts the batches of one optimizer step, and weights their losses.

    With ``loss_weight="batch"`` each loss is divided by the number of batches before its backward pass, exactly as in a
    hand-written loop. With any other weight each loss is multiplied by its weight, and the gradients are divided once by the
    sum of the weights. Either way the gradient equals that of one big batch.

    Example:
        >>> window = Window()
        >>> window.configure(4)
        >>> window.limit(left=2)  # the epoch has two batches left
        >>> window.length
        2
    """

    def __init__(self) -> None:
        self.batches = 0
        """The number of batches accumulated; 0 if no window is open."""
        self.length = 1
        """The number of batches after which the open window is full."""
        self.weight: Any = 0.0
        """The sum of the weights of the batches."""
        self.is_open = False
        """Whether a window has been started, from the first batch's ``FORWARD_STARTED`` on."""
        self.will_be_dropped = False
        """Whether the data ends before the open window is full, and the window will then be dropped."""
        self.configure()

    def configure(self, steps: int = 1, loss_weight: str | Callable[[Any], Any] = "batch", partial: str = "step") -> None:
        """Sets the number of batches in a window, their weights, and what happens to a shorter last window.

        An open window keeps its settings; the next one uses the new settings.
        """
        self._settings, self._has_new_settings = (steps, loss_weight, partial), True
        if not self.is_open:
            self._apply_settings()

    @property
    def settings(self) -> tuple[int, str | Callable[[Any], Any], str]:
        """Steps, loss weight and policy as last configured."""
        return self._settings

    def _apply_settings(self) -> None:
        self._has_new_settings = False
        self.steps, self.loss_weight, self.partial = self._settings

    @property
    def is_empty(self) -> bool:
        """Whether the next batch starts a new window."""
        return self.batches == 0

    @property
    def is_full(self) -> bool:
        """Whether the window has all its batches."""
        return self.batches == self.length

    @property
    def is_last_batch(self) -> bool:
        """Whether the next batch fills the window."""
        return self.batches + 1 == self.length

    def open(self, engine: Any, phase: Any) -> None:
        """Starts a new window, which is shorter if the data ends earlier.

        Args:
            engine: the trainer, which knows how many batches are left.
            phase: the phase of this window.
        """
        if self.steps > 1:
            self.limit(engine.batches_left(phase))
        else:
            self.is_open, self.length, self.weight, self.will_be_dropped = True, 1, 0.0, False

    def limit(self, left: float) -> None:
        """Starts a new window with at most this many batches.

        Args:
            left: the number of batches before the data ends; infinite if unknown.
        """
        self.is_open = True
        is_partial = left < self.steps
        self.will_be_dropped = is_partial and self.partial == "drop"
        self.length = int(left) if is_partial and not self.will_be_dropped else self.steps
        self.weight = 0.0

    def reset(self) -> None:
        """Ends the window, used or discarded."""
        self.batches, self.weight, self.is_open = 0, 0.0, False
        if self._has_new_settings:
            self._apply_settings()

    def count(self, weight: Any) -> None:
        """Counts a batch with its weight."""
        self.batches += 1
        if weight is not None:
            self.weight += weight

    def scale_loss(self, loss: torch.Tensor, weight: Any) -> torch.Tensor:
        """The loss for the backward pass: divided by the window's length, or multiplied by the batch's weight."""
        if weight is None:
            return loss if self.length == 1 else loss / self.length
        scaled: torch.Tensor = loss * weight
        return scaled

    def batch_weight(self, batch: Any) -> Any:
        """The weight of a batch: a number, or a scalar tensor on the device; ``None`` if every batch counts the same.

        Raises:
            TypeError: if samples are counted and no tensor in the batch has a length.
            ValueError: if the user's function does not return a finite number of at least 0.
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

    def divisor(self, is_only_process: bool = True) -> Any:
        """The number by which the accumulated gradients must be divided; ``None`` for 1.

        Args:
            is_only_process: whether no other process contributes to this window.

        Raises:
            ValueError: if all batches of the window have weight 0.
        """
        if self.loss_weight == "batch":  # the losses were divided already, by the length that was planned
            return None if self.batches == self.length else self.batches / self.length
        if is_only_process and not isinstance(self.weight, torch.Tensor) and self.weight == 0:
            raise ValueError("every batch of this window weighs 0 by loss_weight: its mean loss is not defined")
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        """The counters of the open window."""
        return {"batches": self.batches, "length": self.length, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores an open window."""
        self.batches, self.length, self.weight = state["batches"], state["length"], state["weight"]
        self.is_open = self.batches > 0


def checked_weight(weight: Any, function: Callable[[Any], Any]) -> Any:
    """Validates a weight from a user's function. A scalar tensor stays on its device, so that nothing waits for it."""
    if isinstance(weight, torch.Tensor) and weight.numel() == 1:
        if weight.device.type != "cpu":
            return weight.detach().reshape(())
        weight = float(weight)
    if not isinstance(weight, Real) or not 0 <= float(weight) < float("inf"):
        name = getattr(function, "__qualname__", repr(function))
        raise ValueError(f"loss_weight ({name}) must return a finite number of at least 0, got {weight!r}")
    return float(weight)
