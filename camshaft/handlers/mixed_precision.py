"""Mixed precision: forward and loss under autocast, with a gradient scaler for float16."""

from __future__ import annotations

from typing import Any

import torch

from camshaft.handler import Handler
from camshaft.precision import Precision, autocast_dtype, precision_for

__all__ = ["MixedPrecision"]


class MixedPrecision(Handler):
    """Runs forward pass and loss under autocast; with float16 the loss is scaled so that small gradients survive.

    It is a setting that the step itself reads: attaching sets it, detaching removes it. The backward pass runs outside
    autocast, and gradients are unscaled before ``GRADIENTS_READY``, as torch documents it
    (https://docs.pytorch.org/docs/stable/notes/amp_examples.html).

    Args:
        dtype: ``"bf16"``, ``"fp16"``, ``torch.bfloat16`` or ``torch.float16``.
        phase: the phase it applies to; all of them by default.

    Raises:
        ValueError: if ``dtype`` is not such a precision.
        RuntimeError: at ``attach``, if the device does not support it.

    Example:
        >>> from camshaft import create_trainer
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
        >>> precision = MixedPrecision("bf16").attach(trainer)
    """

    needs_trainer = True

    def __init__(self, dtype: str | torch.dtype, *, phase: str | None = None) -> None:
        self.dtype = autocast_dtype(dtype)
        self.phase = phase
        self._phases: list[Any] = []

    def on_attach(self, engine: Any) -> None:
        """Gives each phase its precision."""
        phases = engine.phases_named(self.phase)
        taken = [phase.name for phase in phases if phase.precision.dtype is not None]
        if taken:
            raise ValueError(f"phase {taken[0]!r} has a precision already; detach that MixedPrecision first")
        precisions = [precision_for(self.dtype, phase.device) for phase in phases]
        for phase, precision in zip(phases, precisions, strict=True):
            phase.precision = precision
        self._phases = phases

    def on_detach(self, engine: Any) -> None:
        """Returns to full precision."""
        for phase in self._phases:  # empty if attaching failed
            phase.precision = Precision()
        self._phases = []
