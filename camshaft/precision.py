"""Which precisions there are, and what a device can do."""

from __future__ import annotations

import torch

__all__ = ["autocast_for", "dtype_of"]

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(amp: str | torch.dtype) -> torch.dtype:
    """The dtype that ``"bf16"``, ``"fp16"`` or a dtype itself stands for.

    Raises:
        ValueError: where it is none of them.
    """
    dtype = NAMES.get(amp) if isinstance(amp, str) else amp
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"amp must be None, 'bf16', 'fp16', torch.bfloat16 or torch.float16, got {amp!r}")
    return dtype


def autocast_for(amp: str | torch.dtype | None, device: torch.device) -> torch.autocast | None:
    """The autocast context for a precision on a device; ``None`` for full precision. One serves a whole run.

    Raises:
        ValueError: where ``amp`` is no precision.
        RuntimeError: where the device can't do it.
    """
    if amp is None:
        return None
    dtype = dtype_of(amp)
    if not torch.amp.is_autocast_available(device.type):
        raise RuntimeError(f"amp={amp!r}: there is no autocast on {device.type!r} devices; use amp=None")
    if device.type == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RuntimeError(f"amp={amp!r}: {torch.cuda.get_device_name(device)} has no bfloat16; use amp='fp16'")
    return torch.autocast(device.type, dtype=dtype)
