"""Collectives over all ranks, on top of ``torch.distributed``."""

from __future__ import annotations

import atexit
import pickle
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist

__all__ = [
    "all_gather_object",
    "all_reduce",
    "all_reduce_max",
    "all_reduce_mean",
    "broadcast",
    "broadcast_object",
    "cpu_group",
    "is_main_process",
    "on_rank_zero",
    "rank",
    "until_any_rank_is_exhausted",
    "world_size",
]

Result = TypeVar("Result")

_cpu_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_recent_works: list[Any] = []


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return int(idist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return int(idist.get_rank()) if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this process is rank 0, which writes files and shows progress bars."""
    return rank() == 0


# -- objects and numbers, on the CPU --------------------------------------------------------------------------------------


def cpu_group() -> Any:
    """A gloo group of all ranks: a decision sent through it waits for no kernel on a device."""
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _cpu_groups:
        _cpu_groups[world] = dist.new_group(backend="gloo")
    return _cpu_groups[world]


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """The maximum over all ranks of each number. Every rank must call it with the same count of numbers."""
    numbers = torch.tensor(values, dtype=torch.int64)
    all_reduce(numbers, dist.ReduceOp.MAX)
    return [int(number) for number in numbers.tolist()]


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in order; like torch's ``all_gather_object``, but safe at the end of the process."""
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    _wait(dist.all_gather(sizes, torch.tensor([len(own)]), group=cpu_group(), async_op=True))
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(own, (0, longest - len(own)))
    parts = [torch.empty_like(padded) for _ in sizes]
    _wait(dist.all_gather(parts, padded, group=cpu_group(), async_op=True))
    return [pickle.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def broadcast_object(value: Any) -> Any:
    """The value of rank 0. Every rank must call it; the values of the others are ignored."""
    return all_gather_object(value if rank() == 0 else None)[0]


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Runs an action on rank 0 alone. Every rank must call it; all get the result, or raise an error if the action fails.

    Args:
        action: called without arguments; its result must be picklable.

    Returns:
        What the action returns.

    Raises:
        Exception: if the action fails, or its result cannot be pickled. Rank 0 raises the error itself. The other ranks raise
            one of the same class, or of the closest base class that can be made from a text, and it names rank 0.
    """
    if world_size() == 1:
        return action()
    if rank() != 0:
        result, error = pickle.loads(broadcast_object(None))
        if error is not None:
            kind, text = error
            raise kind(text)
        return result  # type: ignore[no-any-return]
    try:
        result = action()
        message = pickle.dumps((result, None))
    except Exception as error:
        broadcast_object(pickle.dumps((None, _error_for_other_ranks(error))))
        raise
    broadcast_object(message)
    return result


def _error_for_other_ranks(error: Exception) -> tuple[type[Exception], str]:
    """The class and the text of the error that the other ranks raise."""
    text = f"{str(error) or type(error).__name__} (on rank 0)"
    for kind in type(error).__mro__:
        try:
            pickle.dumps(kind)
            if text in str(kind(text)):
                return kind, text
        except Exception:  # a local class cannot be pickled, and a class may need other arguments
            continue
    return RuntimeError, text


def _wait(work: Any) -> None:
    """Waits for a transfer, and keeps a reference to it until a few more have ended.

    Otherwise a thread of gloo may be the last one to release it. If the interpreter is shutting down at that moment, as after
    the last transfer of a run, SIGABRT kills the process. For the same reason the interpreter waits half a second at exit.
    """
    if not _recent_works:
        atexit.register(time.sleep, 0.5)
    work.wait()
    _recent_works[:] = [*_recent_works[-3:], work]


def until_any_rank_is_exhausted(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of this rank, until any rank has no more. The ranks need not know the number of their batches."""
    for batch in batches:
        if all_reduce_max([0])[0]:
            return
        yield batch
    all_reduce_max([1])


# -- tensors --------------------------------------------------------------------------------------------------------------


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Replaces a tensor by its sum over all ranks, or by another reduction (``op``)."""
    _wait(dist.all_reduce(tensor, op, group=_group_for(tensor), async_op=True))


def all_reduce_mean(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor by its mean over all ranks, with one transfer per device and dtype."""
    for group in _grouped_by_kind(tensors):
        if group[0].is_sparse:
            for tensor in group:
                all_reduce(tensor)
                tensor.div_(world_size())
            continue
        flat = _flatten(group)
        all_reduce(flat)
        _unflatten(flat.div_(world_size()), group)


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor by that of rank 0, with one transfer per device and dtype."""
    for group in _grouped_by_kind(tensors):
        flat = _flatten(group)
        _wait(dist.broadcast(flat, src=0, group=_group_for(flat), async_op=True))
        _unflatten(flat, group)


def _group_for(tensor: torch.Tensor) -> Any:
    """The group that sends a tensor; NCCL, for one, cannot send those on the CPU."""
    return cpu_group() if tensor.device.type == "cpu" else None


def _grouped_by_kind(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Lists of tensors that can be sent together."""
    groups: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype, tensor.is_sparse), []).append(tensor)
    return list(groups.values())


def _flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
