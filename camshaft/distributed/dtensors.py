"""Sharded tensors (DTensor), of which each rank holds a part."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["distribute_like", "full_tensor", "is_dtensor", "local_tensor"]


def is_dtensor(tensor: Any) -> bool:
    """Whether a value is a sharded tensor."""
    return hasattr(tensor, "to_local")


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor as it is."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all ranks, each of which must call it; any other tensor as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def distribute_like(tensor: Any, reference: Any) -> Any:
    """A full tensor sharded like ``reference``; unchanged if ``reference`` is not sharded, or has another shape."""
    if not hasattr(reference, "placements") or not isinstance(tensor, torch.Tensor) or hasattr(tensor, "placements"):
        return tensor
    if tensor.shape != reference.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
