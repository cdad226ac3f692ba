"""Mixed precision: forward and loss under autocast, with a gradient scaler for float16."""

from __future__ import annotations

from typing import Any

import torch

from camshaft.handler import Handler
from camshaft.precision import autocast_for, dtype_of

__all__ = ["MixedPrecision"]


class MixedPrecision(Handler):
    """Runs forward pass and loss under autocast; with float16 the loss is scaled so that small gradients survive.

    It is a setting that the step itself reads: attaching sets it, detaching takes it back. The backward pass runs outside
    autocast, and gradients are unscaled before ``GRADIENTS_READY``, as torch documents it
    (https://docs.pytorch.org/docs/stable/notes/amp_examples.html).

    Args:
        dtype: ``"bf16"``, ``"fp16"``, ``torch.bfloat16`` or ``torch.float16``.
        phase: the phase that it is for; all of them by default.

    Raises:
        ValueError: where ``dtype`` is no such precision.
        RuntimeError: at ``attach``, where the device can't do it.

    Example:
        >>> from camshaft import create_trainer
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
        >>> precision = MixedPrecision("bf16").attach(trainer)
    """

    needs_trainer = True

    def __init__(self, dtype: str | torch.dtype, *, phase: str | None = None) -> None:
        self.dtype = dtype_of(dtype)
        self.phase = phase
        self._set: list[Any] = []

    def on_attach(self, engine: Any) -> None:
        """Gives each phase its autocast and, for float16, its scaler."""
        phases = engine.phases_named(self.phase)
        taken = [phase.name for phase in phases if phase.autocast is not None]
        if taken:
            raise ValueError(f"phase {taken[0]!r} has a precision already; detach that MixedPrecision first")
        contexts = [autocast_for(self.dtype, phase.device) for phase in phases]
        for phase, autocast in zip(phases, contexts, strict=True):
            phase.autocast = autocast
            phase.scaler = torch.amp.GradScaler(phase.device.type) if self.dtype is torch.float16 else None
        self._set = phases

    def on_detach(self, engine: Any) -> None:
        """Takes them back."""
        for phase in self._set:  # none, where attaching was refused
            phase.autocast = phase.scaler = None
        self._set = []
