"""The number format of a forward pass, and the scale of its loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["Precision", "autocast_dtype", "precision_for"]

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Full precision, or autocast in a dtype that needs no gradient scaler. :func:`precision_for` makes one.

    Args:
        dtype: the dtype of autocast; ``None`` for full precision.
        device: the device of the forward pass.
    """

    def __init__(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.dtype = dtype
        """The dtype of autocast; ``None`` for full precision."""
        self.autocast: AbstractContextManager[Any] = nullcontext()
        """The context of the forward pass and the loss. Under full precision an outer autocast stays in force."""
        if dtype is not None and device is not None:
            self.autocast = torch.autocast(device.type, dtype=dtype)
        self.scaler = torch.amp.GradScaler(enabled=False)
        """The gradient scaler; disabled unless the dtype is float16."""

    def backward(self, loss: torch.Tensor) -> None:
        """Runs the backward pass of a loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizers: Sequence[Optimizer]) -> None:
        """Divides the gradients by the scale: here there is none."""

    def overflows(self, optimizers: Sequence[Optimizer]) -> list[torch.Tensor]:
        """What :meth:`unscale` has found: scalar tensors on the device that are nonzero if a gradient overflowed."""
        return []

    def update_scale(self, optimizers: Sequence[Optimizer]) -> None:
        """Adjusts the scale after an optimizer step, made or skipped."""

    def discard_unscaling(self) -> None:
        """Allows the next :meth:`unscale` after gradients have been discarded; the scale stays as it is."""

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty if there is no scaler."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the scaler, if there is one and the checkpoint has its state."""


class ScaledPrecision(Precision):
    """Autocast in float16, with a gradient scaler so that small gradients do not underflow."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.float16, device)
        self.scaler = torch.amp.GradScaler(device.type)

    def backward(self, loss: torch.Tensor) -> None:
        """Runs the backward pass of a loss times the scale."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizers: Sequence[Optimizer]) -> None:
        """Divides the gradients by the scale."""
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)

    def overflows(self, optimizers: Sequence[Optimizer]) -> list[torch.Tensor]:
        """What :meth:`unscale` has found: scalar tensors on the device that are nonzero if a gradient overflowed."""
        return [found for o in optimizers for found in self.scaler._found_inf_per_device(o).values()]

    def update_scale(self, optimizers: Sequence[Optimizer]) -> None:
        """Adjusts the scale after an optimizer step, made or skipped."""
        if self.overflows(optimizers):
            self.scaler.update()

    def discard_unscaling(self) -> None:
        """Allows the next :meth:`unscale` after gradients have been discarded; the scale stays as it is."""
        if self.scaler._scale is not None:
            self.scaler.update(self.scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the scaler, if the checkpoint has its state."""
        if state:
            self.scaler.load_state_dict(state)


def precision_for(amp: str | torch.dtype | None, device: torch.device) -> Precision:
    """The precision of an ``amp`` argument on a device.

    Args:
        amp: ``None``, ``"bf16"``, ``"fp16"`` or the ``torch.dtype``.
        device: the device of the forward pass.

    Raises:
        ValueError: if ``amp`` is not such a precision.
        RuntimeError: if the device does not support it.

    Example:
        >>> precision_for("bf16", torch.device("cpu")).dtype
        torch.bfloat16
    """
    if amp is None:
        return Precision()
    dtype = autocast_dtype(amp)
    check_supported(amp, dtype, device)
    return ScaledPrecision(device) if dtype is torch.float16 else Precision(dtype, device)


def autocast_dtype(amp: str | torch.dtype) -> torch.dtype:
    """The dtype of ``"bf16"``, ``"fp16"`` or a dtype itself.

    Raises:
        ValueError: if it is neither bfloat16 nor float16.
    """
    dtype = NAMES.get(amp) if isinstance(amp, str) else amp
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"amp must be None, 'bf16', 'fp16', torch.bfloat16 or torch.float16, got {amp!r}")
    return dtype


def check_supported(amp: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ``RuntimeError`` if a device does not support autocast in a dtype."""
    if not torch.amp.is_autocast_available(device.type):
        raise RuntimeError(f"amp={amp!r}: there is no autocast on {device.type!r} devices; use amp=None")
    if device.type == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RuntimeError(f"amp={amp!r}: {torch.cuda.get_device_name(device)} has no bfloat16; use amp='fp16'")
