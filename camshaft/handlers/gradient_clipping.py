"""Gradient clipping by norm, by value or by a function, and the gradient norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from camshaft.distributed.dtensors import full_tensor
from camshaft.events import Priority, StepEvents
from camshaft.grad_norms import GradNorms
from camshaft.handler import Handler, on
from camshaft.validation import check_positive

__all__ = ["GradientClipping"]


class GradientClipping(Handler):
    """Clips the true gradient (unscaled, normalized) of every window, and measures its total norm.

    ``state.grad_norm`` is the norm before clipping, a tensor on the device; nothing waits for it. Without a bound the norm is
    only measured. Clipping by norm is that of Pascanu et al. 2013 (https://arxiv.org/abs/1211.5063), by ``torch.nn.utils``.

    Args:
        max_norm: the maximum total norm over all parameters.
        norm_type: the order of the norm: 2, 1, ``float("inf")`` or any other positive number.
        clip_value: the maximum absolute value of an entry; applied after ``max_norm`` if both are given.
        function: any other way to clip: called with the list of parameters, whose ``.grad`` it may change in place.
        phase: the phase it applies to; all of them by default.

    Raises:
        ValueError: if a bound is not positive, or ``function`` is combined with a bound.
        TypeError: if ``function`` is not callable.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from camshaft import create_trainer
        >>> model = nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.mse_loss)
        >>> clipping = GradientClipping(max_norm=1.0).attach(trainer)
    """

    changes = ("gradients",)

    def __init__(
        self,
        max_norm: float | None = None,
        *,
        norm_type: float = 2.0,
        clip_value: float | None = None,
        function: Callable[[list[nn.Parameter]], Any] | None = None,
        phase: str | None = None,
    ) -> None:
        if function is not None and not callable(function):
            raise TypeError(f"function must be callable, got {function!r}")
        if function is not None and (max_norm is not None or clip_value is not None):
            raise ValueError("function can't be combined with max_norm or clip_value")
        self.max_norm = None if max_norm is None else check_positive(max_norm, "clip_grad_norm (max_norm)")
        self.clip_value = None if clip_value is None else check_positive(clip_value, "clip_grad_value (clip_value)")
        self.norm_type = check_positive(norm_type, "norm_type")
        self.function, self.phase = function, phase

    def on_attach(self, engine: Any) -> None:
        """Checks the phase's name, and says which norm will be computed."""
        for phase in engine.phases_named(self.phase):
            phase.grad_norms.expect(self.norm_type)

    def on_detach(self, engine: Any) -> None:
        """Says that this norm is not computed any more."""
        for phase in engine.phases_named(self.phase):
            phase.grad_norms.unexpect(self.norm_type)

    @on(StepEvents.GRADIENTS_READY, priority=Priority.CLIP)
    def clip(self, engine: Any) -> None:
        """Computes the norm, then clips."""
        state = engine.state
        if self.phase is not None and state.phase != self.phase:
            return
        phase = engine.phases[state.phase]
        parameters = phase.parameters()
        settings = self.max_norm, self.norm_type, self.clip_value
        norm = phase.execution.clip(phase, settings, lambda norms: self._clip(parameters, norms))
        if state.grad_norm is None:  # another GradientClipping may have computed it before
            state.grad_norm = full_tensor(norm)
        if self.function is not None:
            self.function(parameters)

    def _clip(self, parameters: list[nn.Parameter], norms: GradNorms) -> torch.Tensor:
        """Clips to the bounds; returns the norm before clipping."""
        norm = norms.total([p.grad for p in parameters if p.grad is not None], self.norm_type)
        if self.max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        return norm

    def describe(self) -> str:
        """Its name and its bounds."""
        bounds = {"max_norm": self.max_norm, "clip_value": self.clip_value, "function": self.function, "phase": self.phase}
        given = [f"{name}={getattr(bound, '__name__', bound)}" for name, bound in bounds.items() if bound is not None]
        return f"{super().describe()}({', '.join(given)})"
