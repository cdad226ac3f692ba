"""Points of the training curves: gathered on the device, summed over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import torch

from camshaft.distributed.collectives import all_gather_object, all_reduce, all_reduce_max, world_size
from camshaft.readback import Readback

__all__ = ["Point", "as_numbers", "flatten_metrics", "sum_over_ranks"]


class Point(NamedTuple):
    """One point of every training curve, on the device until it is written."""

    step: int
    time: float
    losses: list[torch.Tensor]
    """The losses since the last point."""
    batches: int
    """The number of batches since the last point."""
    samples: Any
    """The number of samples since the last point."""
    values: dict[str, Any]
    """The values of the other curves by name."""


def sum_over_ranks(point: Point, averaged: set[str], device: torch.device) -> Point:
    """The point of all ranks: losses and samples are summed, in one transfer between the devices.

    Args:
        point: the point of this rank.
        averaged: the names in ``point.values`` that are averaged over the ranks that have them.
        device: the device of the transfer.
    """
    names, are_everywhere = names_of_all_ranks(averaged)
    exists = [name in averaged for name in names]
    own = [point.values[name] if here else 0.0 for name, here in zip(names, exists, strict=True)]
    loss = torch.stack(point.losses).sum() if point.losses else 0.0
    parts = [loss, float(point.samples), *own, *([] if are_everywhere else map(float, exists))]
    summed = torch.stack([torch.as_tensor(part).detach().to(device, torch.float64).reshape(()) for part in parts])
    all_reduce(summed)
    count = world_size() if are_everywhere else summed[2 + len(names) :]
    means = (summed[2 : 2 + len(names)] / count).float()
    losses = [summed[0].float()] if point.losses else []
    values = point.values | dict(zip(names, means, strict=True))
    return point._replace(losses=losses, batches=point.batches * world_size(), samples=summed[1], values=values)


def names_of_all_ranks(names: set[str]) -> tuple[list[str], bool]:
    """The names that any rank has, in the same order on every rank, and whether every rank has them all.

    The ranks compare a hash of their names, and exchange the names only if it differs.
    """
    own = sorted(names)
    digest = int.from_bytes(blake2b("\n".join(own).encode(), digest_size=7).digest(), "big")
    largest, smallest = all_reduce_max([digest, -digest])
    if largest == -smallest:
        return own, True
    return sorted({name for part in all_gather_object(own) for name in part}), False


def flatten_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the metrics that are numbers, and the entries of vectors and mappings of numbers; warns about any others."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flatten_metrics({f"{name}/{key}": item for key, item in value.items()})
        elif isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() > 1:
            yield from ((f"{name}/{number}", item) for number, item in enumerate(value))
        elif isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            yield name, value
        elif hasattr(value, "item") and getattr(value, "size", 0) == 1:  # a NumPy scalar
            yield name, float(value)
        else:
            warnings.warn(f"TensorBoard: the metric {name!r} is a {type(value).__name__}, not a number", stacklevel=2)


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number in metrics by name."""
    found = dict(flatten_metrics(metrics))
    return dict(zip(found, Readback(list(found.values())).floats(), strict=True))
