"""What several processes decide together and bring together, through ``torch.distributed``; a single one asks nobody."""

from __future__ import annotations

import atexit
import itertools
import pickle
import re
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn

__all__ = [
    "Failures",
    "agreed",
    "all_reduce",
    "average",
    "copy_from_first",
    "everyones",
    "first_ones",
    "is_sharded",
    "is_split",
    "is_writer",
    "local",
    "pass_together",
    "rank",
    "replica",
    "split_like",
    "whole",
    "world_size",
]

_host_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_last_work: list[Any] = []
_runs = itertools.count()


def world_size() -> int:
    """How many processes train together; 1 where no process group has been initialised."""
    return int(idist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(idist.get_rank()) if dist.is_available() and dist.is_initialized() else 0


def is_writer() -> bool:
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


def agreed(values: Sequence[int]) -> list[int]:
    """The largest of every process's number, one by one: what one of them wants, all of them know.

    Every process must call it at the same moment, with as many numbers.
    """
    numbers = torch.tensor(values, dtype=torch.int64)
    all_reduce(numbers, dist.ReduceOp.MAX, host_group())
    return [int(number) for number in numbers.tolist()]


def everyones(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks: what ``all_gather_object`` does, with its end waited for."""
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    _finish(dist.all_gather(sizes, torch.tensor([len(own)]), group=host_group(), async_op=True))
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(own, (0, longest - len(own)))
    parts = [torch.empty_like(padded) for _ in sizes]
    _finish(dist.all_gather(parts, padded, group=host_group(), async_op=True))
    return [pickle.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def first_ones(value: Any) -> Any:
    """The value of rank 0."""
    return everyones(value if rank() == 0 else None)[0]


def _finish(work: Any) -> None:
    """Waits for a transfer and keeps hold of it until the next one.

    A thread of gloo may be the last to let go of a transfer. If Python is ending by then, as it is after a run's last one, the
    process dies by SIGABRT with all its work done. So Python's end waits a moment for those threads, too.
    """
    if not _last_work:
        atexit.register(time.sleep, 0.5)
    work.wait()
    _last_work[:] = [*_last_work[-3:], work]


def pass_together(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches of unknown number, up to where the first process has no more."""
    for batch in batches:
        if agreed([0])[0]:
            return
        yield batch
    agreed([1])


# -- tensors --------------------------------------------------------------------------------------------------------------


def is_split(tensor: Any) -> bool:
    """Whether it is a tensor of which each process holds a part of its own."""
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: a sharded one's own part, in the same memory."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor: a sharded one's parts brought together, which every process must ask for."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def split_like(tensor: Any, reference: Any) -> Any:
    """A whole tensor as this process holds it where ``reference`` is sharded; anything else as it is."""
    if not hasattr(reference, "placements") or not isinstance(tensor, torch.Tensor) or hasattr(tensor, "placements"):
        return tensor
    if tensor.shape != reference.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    """Puts the sum over all processes, or what else ``op`` says, in place of a tensor."""
    _finish(dist.all_reduce(tensor, op, group=group, async_op=True))


def average(tensors: Iterable[torch.Tensor]) -> None:
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


def copy_from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Puts rank 0's values in place of each tensor, in one transfer per kind of tensor."""
    for group in _alike(tensors):
        flat = _flattened(group)
        _finish(dist.broadcast(flat, src=0, async_op=True))
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


def replica(module: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The ``DistributedDataParallel`` that a model is, under ``torch.compile`` too; ``None`` where it is none."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.parallel.DistributedDataParallel) else None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` has been applied to a model or to parts of it."""
    return bool(shards(module))


def shards(module: nn.Module) -> list[Any]:
    """The outermost parts of a model that ``fully_shard`` has been applied to."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return []
    if isinstance(module, FSDPModule):
        return [module]
    return [part for child in module.children() for part in shards(child)]


# -- what became of the others --------------------------------------------------------------------------------------------

TALK = re.compile(
    r"\bgloo[/\\]|ProcessGroup(Gloo|NCCL)|\bNCCL (error|communicator|operation)|collective operation|monitoredBarrier"
)
"""What an error says that has come up between the processes: gloo's texts begin with the place in its source."""
GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|remote process|communicator was aborted", re.IGNORECASE)
"""What such a one says where another process has left."""
PATIENCE = 3.0
"""For so many seconds a process that has lost another one asks what became of it."""


class Failures:
    """Tells the processes of one run which of them has failed, and why: it is written down before that one leaves."""

    def __init__(self) -> None:
        self.key = f"camshaft/failure/{next(_runs)}"
        self.store = _store()

    def leave(self, error: BaseException, where: str) -> BaseException:
        """What a process raises that leaves a run by an exception; it waits for nobody.

        Args:
            error: the exception.
            where: the place in the run.

        Returns:
            ``error`` itself, which is written down for the others; or, where it came of another process's failure, a
            ``RuntimeError`` that names that one.
        """
        found = self._read() if came_between(error) else None
        if found is None and came_between(error) and GONE.search(str(error)):
            found = "another process has left the run without a word (killed, or out of memory?)"
        if found is None:
            self._write(f"rank {rank()} failed {where}: {type(error).__name__}: {error}")
            return error
        named = RuntimeError(f"{found}; rank {rank()} can't go on without it, {where}")
        named.__cause__ = error
        return named

    def _write(self, text: str) -> None:
        if self.store is not None:
            try:
                self.store.compare_set(self.key, "", text)
            except RuntimeError:  # the store has gone with the process that kept it
                self.store = None

    def _read(self) -> str | None:
        until = time.monotonic() + PATIENCE
        while self.store is not None and time.monotonic() < until:
            try:
                if self.store.check([self.key]):
                    return str(self.store.get(self.key).decode())
            except RuntimeError:
                return None
            time.sleep(0.05)
        return None


def came_between(error: BaseException) -> bool:
    """Whether an error has come up between the processes, so that another one's failure may be behind it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and TALK.search(str(error)) is not None)


def _store() -> Any:
    """The key-value store through which the processes have found each other."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
