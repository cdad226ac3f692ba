"""What several processes decide together and bring together, through ``torch.distributed``; a single one asks nobody."""

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
    "host_group",
    "is_main_process",
    "on_rank_zero",
    "rank",
    "until_rank_zero_is_exhausted",
    "world_size",
]

Result = TypeVar("Result")

_host_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_last_work: list[Any] = []


def world_size() -> int:
    """How many processes train together; 1 if no process group has been initialised."""
    return int(idist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(idist.get_rank()) if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and draws bars: the first."""
    return rank() == 0


# -- decisions, on the host -----------------------------------------------------------------------------------------------


def host_group() -> Any:
    """A group of all processes that speaks from host to host, so that a decision waits for no device."""
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _host_groups:
        _host_groups[world] = dist.new_group(backend="gloo")
    return _host_groups[world]


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """The largest of every process's number, one by one: what one of them wants, all of them know.

    Every process must call it at the same moment, with as many numbers.
    """
    numbers = torch.tensor(values, dtype=torch.int64)
    all_reduce(numbers, dist.ReduceOp.MAX, host_group())
    return [int(number) for number in numbers.tolist()]


def all_gather_object(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks: what ``all_gather_object`` does, with its end waited for."""
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    _wait(dist.all_gather(sizes, torch.tensor([len(own)]), group=host_group(), async_op=True))
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(own, (0, longest - len(own)))
    parts = [torch.empty_like(padded) for _ in sizes]
    _wait(dist.all_gather(parts, padded, group=host_group(), async_op=True))
    return [pickle.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def broadcast_object(value: Any) -> Any:
    """The value of rank 0."""
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
    """Waits for a transfer and keeps hold of it until the next one.

    A thread of gloo may be the last to cleared a transfer. If Python is ending by then, as it is after a run's last one, the
    process dies by SIGABRT with all its work done. So Python's end waits a moment for those threads, too.
    """
    if not _last_work:
        atexit.register(time.sleep, 0.5)
    work.wait()
    _last_work[:] = [*_last_work[-3:], work]


def until_rank_zero_is_exhausted(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches of unknown number, up to where the first process has no more."""
    for batch in batches:
        if all_reduce_max([0])[0]:
            return
        yield batch
    all_reduce_max([1])


# -- tensors --------------------------------------------------------------------------------------------------------------


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    """Puts the sum over all processes, or what else ``op`` says, in place of a tensor."""
    _wait(dist.all_reduce(tensor, op, group=group, async_op=True))


def all_reduce_mean(tensors: Iterable[torch.Tensor]) -> None:
    """Puts the mean over all processes in place of each tensor, in one transfer per kind of tensor."""
    for group in _alike(tensors):
        if group[0].is_sparse:
            for tensor in group:
                all_reduce(tensor)
                tensor.div_(world_size())
            continue
        flat = _flattened(group)
        all_reduce(flat)
        _unflatten(flat.div_(world_size()), group)


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Puts rank 0's values in place of each tensor, in one transfer per kind of tensor."""
    for group in _alike(tensors):
        flat = _flattened(group)
        _wait(dist.broadcast(flat, src=0, async_op=True))
        _unflatten(flat, group)


def _alike(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype, tensor.is_sparse), []).append(tensor)
    return list(groups.values())


def _flattened(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


# -- models ---------------------------------------------------------------------------------------------------------------


# -- what became of the others --------------------------------------------------------------------------------------------
