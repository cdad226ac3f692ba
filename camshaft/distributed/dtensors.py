"""Tensors of which each process holds a part (DTensor)."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["distribute_like", "full_tensor", "is_dtensor", "local_tensor"]


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a tensor of which each process holds a part of its own."""
    return hasattr(tensor, "to_local")


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: a sharded one's own part, in the same memory."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor: a sharded one's parts brought together, which every process must ask for."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def distribute_like(tensor: Any, reference: Any) -> Any:
    """A whole tensor as this process holds it where ``reference`` is sharded; anything else as it is."""
    if not hasattr(reference, "placements") or not isinstance(tensor, torch.Tensor) or hasattr(tensor, "placements"):
        return tensor
    if tensor.shape != reference.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
