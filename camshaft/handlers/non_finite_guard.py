"""Keeps non-finite losses and gradients away from the weights."""

from __future__ import annotations

from typing import Any

import torch

from camshaft.distributed.collectives import world_size
from camshaft.events import Priority, StepEvents
from camshaft.grad_norms import GradNorms
from camshaft.handler import Handler, on
from camshaft.validation import join_names

__all__ = ["NonFiniteGuard"]

ACTIONS = ("raise", "skip", "stop")


class NonFiniteGuard(Handler):
    """Checks the losses and the gradient of every window before the weights change.

    Under float16 the guard ignores an overflow of the scaled gradient, which the scaler handles. Its flag is read together
    with the scaler's, in one transfer per optimizer step. If a :class:`GradientClipping` is attached, the guard uses the same
    norms, so that they are computed once; a norm that overflows then counts as not finite.

    Args:
        action: ``"raise"`` a ``FloatingPointError`` that names the iteration and what is not finite, ``"skip"`` the step, or
            ``"stop"`` the run before the step.

    Raises:
        ValueError: if ``action`` is none of these.

    Example:
        >>> guard = NonFiniteGuard("skip")
    """

    def __init__(self, action: str = "raise") -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(map(repr, ACTIONS))}, got {action!r}")
        self.action = action
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._trained: list[torch.nn.Parameter] = []
        self._norms: torch.Tensor | None = None

    @on(StepEvents.BACKWARD_COMPLETED, priority=Priority.GUARD)
    def keep_loss(self, engine: Any) -> None:
        """Keeps the losses of the window, on the device."""
        state = engine.state
        if engine.phases[state.phase].window.batches == 1:
            self._losses.clear()
        self._losses.append((state.iteration, state.loss))

    @on(StepEvents.GRADIENTS_READY, priority=Priority.GUARD)
    def check(self, engine: Any) -> None:
        """Requests that the step be skipped if anything is not finite."""
        phase = engine.phases[engine.state.phase]
        self._trained = [p for p in phase.parameters() if p.grad is not None]
        gradients = [p.grad for p in self._trained if p.grad is not None]
        losses, overflows, order = [loss for _, loss in self._losses], phase.overflows(), phase.grad_norms.expected_order

        def find(given: list[torch.Tensor], norms: GradNorms) -> tuple[torch.Tensor, torch.Tensor | None]:
            count, each = len(losses), norms.each(gradients, order) if gradients else None
            return is_non_finite(given[:count], given[count:], each), each

        bad, self._norms = phase.execution.inspect(phase, (order, len(losses)), losses + overflows, find)
        engine.skip_step_if(bad, lambda: self._on_non_finite(engine))

    def _on_non_finite(self, engine: Any) -> None:
        if self.action == "skip":
            return
        message = self._describe_cause(engine)
        if self.action == "raise":
            raise FloatingPointError(message)
        engine.terminate(reason=message)

    def _describe_cause(self, engine: Any) -> str:
        state = engine.state
        where = f"at optimizer step {state.optimizer_step} of phase {state.phase!r}"
        for iteration, loss in self._losses:
            if not bool(loss.isfinite()):
                return f"the loss of iteration {iteration} is {float(loss)}, {where}; the weights are as before it"
        names = {id(parameter): name for name, parameter in engine.phases[state.phase].module.named_parameters()}
        finite = self._norms.isfinite().tolist() if self._trained and self._norms is not None else []
        # the norms before clipping, which spreads a NaN to all gradients
        bad = [
            names.get(id(p), "a parameter of the loss")
            for p, is_finite in zip(self._trained, finite, strict=True)
            if not is_finite
        ]
        if not bad and world_size() > 1:
            return f"the loss or the gradient of another process is not finite in iteration {state.iteration}, {where}"
        return f"the gradient of {join_names(bad, 5)} is not finite in iteration {state.iteration}, {where}"


def is_non_finite(losses: list[torch.Tensor], overflows: list[torch.Tensor], norms: torch.Tensor | None) -> torch.Tensor:
    """Whether a loss or a gradient is not finite, as a boolean scalar tensor.

    Args:
        losses: the losses of the window.
        overflows: what the scaler has found: with an overflow, which it handles, the gradients are not looked at.
        norms: the norm of each gradient; ``None`` if there is no gradient.
    """
    bad = ~torch.stack([loss.reshape(()) for loss in losses]).isfinite().all()
    if norms is not None:
        bad_gradient = ~norms.isfinite().all()
        for overflow in overflows:
            bad_gradient = bad_gradient & (overflow.to(bad_gradient.device) == 0)
        bad = bad | bad_gradient.to(bad.device)
    return bad
