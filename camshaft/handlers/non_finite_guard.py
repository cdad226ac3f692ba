"""A guard that lets nothing non-finite reach the weights."""

from __future__ import annotations

from typing import Any

import torch

from camshaft.distributed import local, world_size
from camshaft.events import Handler, Place, StepEvents, on

__all__ = ["NonFiniteGuard"]

ACTIONS = ("raise", "skip", "stop")


class NonFiniteGuard(Handler):
    """Looks at the losses and the gradient of every window before the weights change.

    Under float16 an overflow of the scaled gradient is the scaler's business, and the guard lets it be. Its
    question is answered together with the scaler's, in one transfer per optimizer step.

    Args:
        action: what to do: ``"raise"`` a ``FloatingPointError`` that names the iteration and what isn't finite, ``"skip"``
            the step, or ``"stop"`` the run without making it.

    Raises:
        ValueError: where ``action`` is none of these.

    Example:
        >>> guard = NonFiniteGuard("skip")
    """

    def __init__(self, action: str = "raise") -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(map(repr, ACTIONS))}, got {action!r}")
        self.action = action
        self._losses: list[tuple[int, torch.Tensor]] = []

    @on(StepEvents.BACKWARD_COMPLETED, place=Place.GUARD)
    def note_loss(self, engine: Any) -> None:
        """Keeps the window's losses, on the device."""
        state = engine.state
        if engine.phases[state.phase].window.batches == 1:
            self._losses.clear()
        self._losses.append((state.iteration, state.loss))

    @on(StepEvents.GRADIENTS_READY, place=Place.GUARD)
    def check(self, engine: Any) -> None:
        """Asks that the step be refused where anything isn't finite."""
        phase = engine.phases[engine.state.phase]
        bad = any_non_finite([loss for _, loss in self._losses])
        gradients = [p.grad for p in phase.parameters() if p.grad is not None]
        if gradients:
            bad_gradient = any_non_finite(gradients)
            for overflow in phase.overflows():  # the scaler's own business
                bad_gradient = bad_gradient & (overflow.to(bad_gradient.device) == 0)
            bad = bad | bad_gradient.to(bad.device)
        engine.refuse_step(bad, lambda: self._refuse(engine))

    def _refuse(self, engine: Any) -> None:
        if self.action == "skip":
            return
        message = self._explain(engine)
        if self.action == "raise":
            raise FloatingPointError(message)
        engine.terminate(reason=message)

    def _explain(self, engine: Any) -> str:
        state = engine.state
        where = f"at optimizer step {state.optimizer_step} of phase {state.phase!r}"
        for iteration, loss in self._losses:
            if not bool(loss.isfinite()):
                return f"the loss of iteration {iteration} is {float(loss)}, {where}; the weights are as before it"
        named = engine.phases[state.phase].module.named_parameters()
        bad = [name for name, p in named if p.grad is not None and not bool(local(p.grad).isfinite().all())]
        if not bad and world_size() > 1:
            return f"the loss or the gradient of another process is not finite in iteration {state.iteration}, {where}"
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        return f"the gradient of {names or 'a parameter'} is not finite in iteration {state.iteration}, {where}"


def any_non_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether any entry isn't finite, as a tensor on the device.

    It looks at the largest magnitudes: unlike sums they can't overflow where all entries are finite.
    """
    held = (local(tensor) for tensor in tensors)
    dense = (tensor._values() if tensor.is_sparse else tensor for tensor in held)
    entries = [values.detach() for values in dense if values.numel()]
    if not entries:
        return torch.zeros((), dtype=torch.bool, device=tensors[0].device)
    peaks = torch._foreach_norm(entries, float("inf"))
    return ~torch.stack([peak.to(peaks[0].device) for peak in peaks]).isfinite().all()
