"""If the data stands: how the same batches are dealt again from the middle of an epoch."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from camshaft.data.prefetch import Prefetch
from camshaft.data.seeding import SeededDataset
from camshaft.rng import generator_state, preserve_rng_state, raw_rng_state, restore_rng, rng_state, to_numpy_state
from camshaft.serialization import pack

__all__ = ["DataLoaderPosition", "length_of"]

logger = logging.getLogger("camshaft")


class DataLoaderPosition:
    """The place in the data: the random state from which the present pass was dealt, and the batches taken since.

    A ``DataLoader`` draws its order from random generators when a pass over it begins. To deal the same order again, those
    states are kept from before the pass; to continue in its middle, the sampler is advanced without loading what it names.
    """

    def __init__(self) -> None:
        self._start: dict[str, Any] | None = None
        self._began = 0
        self._data: Any = None
        self._prefetch: Prefetch | None = None
        self._sampler_epochs: list[int] = []
        self.is_exhausted = False
        """Whether the present pass is known to have no more: it has been asked in vain."""

    def begin(self, data: Iterable[Any] | None, iteration: int, epoch: int) -> None:
        """Notes that a new pass over ``data`` is about to begin, at this iteration and in this epoch."""
        data = self._unwrap_prefetch(data)
        self._data, self._began, self.is_exhausted = data, iteration, False
        for part in _parts(data):
            if isinstance(part, SeededDataset):
                part.set_epoch(epoch)
        self._count_passes(data)
        self._start = {
            "rng": rng_state(),
            "own": _own_states(data),
            "epochs": _epochs(_with_set_epoch(data)),
            "warm": _has_persistent_workers(data) and data._iterator is not None,  # type: ignore[union-attr]
        }

    def _unwrap_prefetch(self, data: Any) -> Any:
        """The loader itself; one that is fetched ahead is looked at before each fetch if that may change something."""
        self._prefetch = data if isinstance(data, Prefetch) else None
        if self._prefetch is None:
            return data
        loader = self._prefetch.loader
        by_others = isinstance(loader, (list, tuple)) or (isinstance(loader, DataLoader) and loader.num_workers > 0)
        keeps_place, own = _is_stateful(loader), _own_generators(loader)

        def look() -> tuple[Any, ...]:
            rng = None if by_others else raw_rng_state()
            state = copy.deepcopy(loader.state_dict()) if keeps_place else None  # type: ignore[attr-defined]
            return rng, [generator_state(generator) for generator in own], state

        self._prefetch.before_fetch = look
        return loader

    def _count_passes(self, data: Any) -> None:
        """Has a ``DistributedSampler`` deal another order than in the last pass if nobody else calls its ``set_epoch``."""
        for sampler, before in zip(_samplers(data), self._sampler_epochs, strict=False):
            if sampler.epoch == before:
                sampler.set_epoch(before + 1)
        self._sampler_epochs = _epochs(_samplers(data))

    def taken(self, iteration: int) -> int:
        """The number of batches that the present pass has given by this iteration."""
        return iteration - self._began

    def state_dict(self, iteration: int, spent: bool) -> dict[str, Any]:
        """What a checkpoint holds of the data.

        Args:
            iteration: the iteration after which it is written.
            spent: whether the present pass has given all that it has.
        """
        spent = self._start is None or (spent and not _is_skippable(self._data))
        state: dict[str, Any] = {"length": length_of(self._data), "spent": spent}
        if not state["spent"]:
            state |= {"start": self._start, "taken": self.taken(iteration)}
        state["own"], state["dealt"] = _own_states(self._data), self._sampler_epochs
        loader = self._data.state_dict() if _is_stateful(self._data) else None
        if self._prefetch is not None and self._prefetch.state_before_fetch is not None:
            rng, own, loader = self._prefetch.state_before_fetch
            state["ahead"] = {"rng": rng and rng.plain(), "own": own}
        if loader is not None:
            state["loader"] = pack(dict(loader), "the data loader's state_dict()")
        return state

    def resume(self, data: Iterable[Any] | None, state: Mapping[str, Any], iteration: int) -> Iterator[Any]:
        """An iterator that continues where a checkpoint's data stood; the random generators are left as they are.

        Args:
            data: the same data as before.
            state: what :meth:`state_dict` gave.
            iteration: the iteration after which it was written.
        """
        data, self.is_exhausted = self._unwrap_prefetch(data), False
        self._sampler_epochs = list(state.get("dealt", ()))
        if state["spent"]:
            _restore_own(data, state["own"])
            _restore_epochs(_samplers(data), self._sampler_epochs)
            return iter(())  # the loop begins the next pass by itself
        self._data, self._start, self._began = data, dict(state["start"]), iteration - state["taken"]
        if data is None:
            raise RuntimeError("the checkpoint was written in the middle of data; call run() with the same data")
        iterator = self._resume_iterator(data, state)
        if self._prefetch is not None:
            iterator = self._fetched_ahead(self._prefetch, iterator, state)
        if not _restores_itself(data, state):
            _restore_own(data, state["own"])
        return iterator

    def _resume_iterator(self, data: Iterable[Any], state: Mapping[str, Any]) -> Iterator[Any]:
        """The loader's own pass, as many batches in as were taken."""
        if _restores_itself(data, state):
            data.load_state_dict(state["loader"])  # type: ignore[attr-defined]
            with preserve_rng_state():
                return iter(data)
        if state["start"]["warm"] and _has_persistent_workers(data):
            _start_workers(data)  # type: ignore[arg-type]
        with preserve_rng_state():
            restore_rng(state["start"]["rng"])
            _restore_own(data, state["start"]["own"])
            _restore_epochs(_with_set_epoch(data), state["start"]["epochs"])
            return _skip_batches(data, state["taken"])

    def _fetched_ahead(self, prefetch: Prefetch, batches: Iterator[Any], state: Mapping[str, Any]) -> Iterator[Any]:
        """The same with the batch that was ahead fetched again, as it was the first time."""
        ahead = state.get("ahead")
        if ahead is None:
            return prefetch.resume(batches, fetched=False)
        with preserve_rng_state():
            if ahead["rng"] is not None:
                restore_rng(ahead["rng"])
            if not _restores_itself(prefetch.loader, state):
                _restore_own(prefetch.loader, ahead["own"])
            return prefetch.resume(batches, fetched=True)


def length_of(data: Any) -> int | None:
    """The number of batches if it is known."""
    try:
        return len(data)
    except TypeError:
        return None


def _is_skippable(data: Any) -> bool:
    """Whether batches can be passed over without loading them.

    Even one that is spent is entered again, at its end: some samplers draw once more when they are asked in vain.
    """
    return isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)


def _is_stateful(data: Any) -> bool:
    """Whether it is a loader that can say by itself if it stands (torchdata's ``StatefulDataLoader``)."""
    return hasattr(data, "state_dict") and hasattr(data, "load_state_dict")


def _restores_itself(data: Any, state: Mapping[str, Any]) -> bool:
    return "loader" in state and _is_stateful(data)


def _skip_batches(data: Any, taken: int) -> Iterator[Any]:
    """A new pass over ``data``, ``taken`` batches in."""
    if _is_skippable(data):
        return _skip_at_the_sampler(data, taken)
    if taken and not isinstance(data, (list, tuple)):
        logger.warning(
            "resume: %s can't be entered in its middle; %d batches are loaded and passed over", type(data).__name__, taken
        )
    iterator: Iterator[Any] = iter(data)
    for number in range(taken):
        try:
            next(iterator)
        except StopIteration:
            raise RuntimeError(f"resume: the data ended after {number} of the {taken} batches taken before") from None
    return iterator


class _Skipping:
    """A sampler that passes over the first draws of another one when it is first asked."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self.sampler, self.skip = sampler, skip
        self.passes: list[_SkippingIterator] = []

    def __iter__(self) -> Iterator[Any]:
        self.passes.append(_SkippingIterator(iter(self.sampler), self.skip))
        return self.passes[-1]

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class _SkippingIterator:
    def __init__(self, draws: Iterator[Any], skip: int) -> None:
        self.draws, self.skip = draws, skip

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.advance()
        return next(self.draws)

    def advance(self) -> None:
        while self.skip:
            next(self.draws)
            self.skip -= 1


def _skip_at_the_sampler(loader: DataLoader[Any], taken: int) -> Iterator[Any]:
    """A pass over a copy of the loader whose sampler has been advanced; nothing that is skipped is loaded."""
    skipping = _Skipping(loader._index_sampler, taken)
    workers = loader._iterator if _has_persistent_workers(loader) else None
    if workers is None:
        iterator: Any = iter(_with_sampler(loader, skipping))
    else:  # they run already, and begin a new pass
        workers._index_sampler = skipping
        iterator = iter(loader)
    for draws in skipping.passes:
        draws.advance()  # at once: without workers the sampler would draw its order only at the first batch
    if _has_persistent_workers(loader):
        _adopt_workers(iterator, loader)
    entered: Iterator[Any] = iterator
    return entered


def _with_sampler(loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    """A copy of a loader with another sampler of indices; the loader is left as it is."""
    twin = copy.copy(loader)
    attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
    twin.__dict__ |= {attribute: sampler, "_iterator": None}  # a loader forbids to set it
    return twin


def _has_persistent_workers(data: Any) -> bool:
    """Whether it is a loader whose workers live from one pass to the next; they draw no new seed then."""
    return isinstance(data, DataLoader) and data.persistent_workers and data.num_workers > 0


def _start_workers(loader: DataLoader[Any]) -> None:
    """Has a loader's persistent workers run, as they did when the checkpoint was written, before any batch is asked for."""
    if loader._iterator is None:
        with preserve_rng_state():
            own = _own_states(loader)
            _adopt_workers(iter(_with_sampler(loader, [])), loader)
            _restore_own(loader, own)


def _adopt_workers(iterator: Any, loader: DataLoader[Any]) -> None:
    """Makes an iterator with its workers the loader's own, for the passes to come."""
    iterator._index_sampler = loader._index_sampler
    loader._iterator = iterator


# -- random generators and epochs that belong to a loader -------------------------------------------------------------


def _parts(data: Any) -> Iterator[Any]:
    """A loader and whatever it is made of that may keep a random generator of its own."""
    seen: set[int] = set()
    waiting = [data]
    while waiting:
        part = waiting.pop(0)
        if part is None or id(part) in seen or isinstance(part, (list, tuple)):
            continue
        seen.add(id(part))
        yield part
        waiting += [getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset")]


def _own_generators(data: Any) -> list[Any]:
    kinds = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
    found = [value for part in _parts(data) for value in getattr(part, "__dict__", {}).values() if isinstance(value, kinds)]
    return list({id(generator): generator for generator in found}.values())


def _own_states(data: Any) -> list[Any]:
    """The states of the generators that the loader, its samplers and its dataset keep for themselves."""
    return [generator_state(generator) for generator in _own_generators(data)]


def _restore_own(data: Any, states: list[Any]) -> None:
    generators = _own_generators(data)
    if len(generators) != len(states):
        raise RuntimeError(
            f"resume: the data has {len(generators)} random generators of its own where the checkpoint has {len(states)}; "
            "make the loader as before"
        )
    for generator, state in zip(generators, states, strict=True):
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, random.Random):
            version, internal, gauss = state
            generator.setstate((version, tuple(internal), gauss))
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(to_numpy_state(state))
        else:
            generator.bit_generator.state = to_numpy_state(state)


def _with_set_epoch(data: Any) -> list[Any]:
    """Whatever deals or augments by the number of the epoch: ``DistributedSampler``, ``SeededDataset``."""
    return [part for part in _parts(data) if hasattr(part, "set_epoch") and isinstance(getattr(part, "epoch", None), int)]


def _samplers(data: Any) -> list[Any]:
    return [part for part in _with_set_epoch(data) if not isinstance(part, SeededDataset)]


def _epochs(parts: list[Any]) -> list[int]:
    return [part.epoch for part in parts]


def _restore_epochs(parts: list[Any], epochs: list[int]) -> None:
    for part, epoch in zip(parts, epochs, strict=False):
        part.set_epoch(epoch)
