"""The position in the data: saves and restores it, so that a resumed run gets the same batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from camshaft.data.prefetch import Prefetch
from camshaft.data.seeding import SeededDataset
from camshaft.resume.loader_parts import (
    distributed_samplers,
    epochs_of,
    generator_states,
    generators_of,
    parts_of,
    restore_epochs,
    restore_generators,
    seeded_by_epoch,
)
from camshaft.resume.loader_skipping import (
    can_skip_at_sampler,
    has_persistent_workers,
    skip_batches,
    start_workers,
    workers_are_alive,
)
from camshaft.rng import encode_generator, preserve_rng_state, raw_rng_state, restore_rng, rng_state
from camshaft.serialization import pack

__all__ = ["DataLoaderPosition", "length_of"]


class DataLoaderPosition:
    """The position in the data: the random states before the current pass, and the number of batches taken from it.

    A ``DataLoader`` draws its order from random generators when a pass over it begins. To get the same order again, the
    states of these generators before the pass are saved; to resume in the middle, the sampler is advanced without loading
    the samples that are skipped.
    """

    def __init__(self) -> None:
        self._start: dict[str, Any] | None = None
        self._first_iteration = 0
        self._data: Any = None
        self._prefetch: Prefetch | None = None
        self._sampler_epochs: list[int] = []
        self.is_exhausted = False
        """Whether the current pass is known to have no more batches, because it did not return one when asked."""

    def begin(self, data: Iterable[Any] | None, iteration: int, epoch: int) -> None:
        """Called before each new pass over the data.

        Args:
            data: the data.
            iteration: the number of iterations so far.
            epoch: the number of the epoch.
        """
        data = self._unwrap_prefetch(data)
        self._data, self._first_iteration, self.is_exhausted = data, iteration, False
        for part in parts_of(data):
            if isinstance(part, SeededDataset):
                part.set_epoch(epoch)
        self._advance_samplers(data)
        self._start = {
            "rng": rng_state(),
            "own": generator_states(data),
            "epochs": epochs_of(seeded_by_epoch(data)),
            "warm": workers_are_alive(data),
        }

    def _unwrap_prefetch(self, data: Any) -> Any:
        """The loader inside a ``Prefetch``, which saves the random states before each fetch from now on."""
        self._prefetch = data if isinstance(data, Prefetch) else None
        if self._prefetch is None:
            return data
        self._prefetch.before_fetch = state_saver(self._prefetch.loader)
        return self._prefetch.loader

    def _advance_samplers(self, data: Any) -> None:
        """Gives each ``DistributedSampler`` the next epoch, for another order, if nobody else calls its ``set_epoch``."""
        for sampler, before in zip(distributed_samplers(data), self._sampler_epochs, strict=False):
            if sampler.epoch == before:
                sampler.set_epoch(before + 1)
        self._sampler_epochs = epochs_of(distributed_samplers(data))

    def taken(self, iteration: int) -> int:
        """The number of batches that the current pass has returned by this iteration."""
        return iteration - self._first_iteration

    def state_dict(self, iteration: int, exhausted: bool) -> dict[str, Any]:
        """The part of a checkpoint that is about the data.

        Args:
            iteration: the iteration after which it is written.
            exhausted: whether the current pass has returned all of its batches.
        """
        # An exhausted loader is resumed at its end too: some samplers draw once more before they stop.
        exhausted = self._start is None or (exhausted and not can_skip_at_sampler(self._data))
        state: dict[str, Any] = {"length": length_of(self._data), "spent": exhausted}
        if not exhausted:
            state |= {"start": self._start, "taken": self.taken(iteration)}
        state["own"], state["dealt"] = generator_states(self._data), self._sampler_epochs
        loader = self._data.state_dict() if is_stateful(self._data) else None
        if self._prefetch is not None and self._prefetch.state_before_fetch is not None:
            rng, own, loader = self._prefetch.state_before_fetch
            state["ahead"] = {"rng": rng and rng.plain(), "own": own}
        if loader is not None:
            state["loader"] = pack(dict(loader), "the data loader's state_dict()")
        return state

    def resume(self, data: Iterable[Any] | None, state: Mapping[str, Any], iteration: int) -> Iterator[Any]:
        """An iterator over the remaining batches of a checkpoint's pass; the global random generators do not change.

        Args:
            data: the same data as before.
            state: the result of :meth:`state_dict`.
            iteration: the iteration after which it was written.

        Raises:
            RuntimeError: if it can't be the same data.
        """
        data, self.is_exhausted = self._unwrap_prefetch(data), False
        self._sampler_epochs = list(state.get("dealt", ()))
        if state["spent"]:
            restore_generators(data, state["own"])
            restore_epochs(distributed_samplers(data), self._sampler_epochs)
            return iter(())  # the loop then begins the next pass
        self._data, self._start, self._first_iteration = data, dict(state["start"]), iteration - state["taken"]
        if data is None:
            raise RuntimeError("the checkpoint was written in the middle of data; call run() with the same data")
        iterator = resume_iterator(data, state)
        if self._prefetch is not None:
            iterator = resume_prefetch(self._prefetch, iterator, state)
        if not restores_itself(data, state):
            restore_generators(data, state["own"])
        return iterator


def state_saver(loader: Any) -> Any:
    """A function that returns the random states that fetching a batch from a loader may change, and the loader's own state."""
    leaves_rng = isinstance(loader, (list, tuple)) or (isinstance(loader, DataLoader) and loader.num_workers > 0)
    stateful, generators = is_stateful(loader), generators_of(loader)

    def save() -> tuple[Any, ...]:
        rng = None if leaves_rng else raw_rng_state()
        state = copy.deepcopy(loader.state_dict()) if stateful else None
        return rng, [encode_generator(generator) for generator in generators], state

    return save


def resume_iterator(data: Any, state: Mapping[str, Any]) -> Iterator[Any]:
    """A pass over the data as the checkpoint's was, without the batches that were taken from it."""
    if restores_itself(data, state):
        data.load_state_dict(state["loader"])
        with preserve_rng_state():
            return iter(data)
    if state["start"]["warm"] and has_persistent_workers(data):
        start_workers(data)
    with preserve_rng_state():
        restore_rng(state["start"]["rng"])
        restore_generators(data, state["start"]["own"])
        restore_epochs(seeded_by_epoch(data), state["start"]["epochs"])
        return skip_batches(data, state["taken"])


def resume_prefetch(prefetch: Prefetch, batches: Iterator[Any], state: Mapping[str, Any]) -> Iterator[Any]:
    """The same pass, with the batch that had been fetched ahead fetched again from the same random states."""
    ahead = state.get("ahead")
    if ahead is None:
        return prefetch.resume(batches, fetched=False)
    with preserve_rng_state():
        if ahead["rng"] is not None:
            restore_rng(ahead["rng"])
        if not restores_itself(prefetch.loader, state):
            restore_generators(prefetch.loader, ahead["own"])
        return prefetch.resume(batches, fetched=True)


def length_of(data: Any) -> int | None:
    """The number of batches if it is known."""
    try:
        return len(data)
    except TypeError:
        return None


def is_stateful(data: Any) -> bool:
    """Whether the loader can save its own position (torchdata's ``StatefulDataLoader``)."""
    return hasattr(data, "state_dict") and hasattr(data, "load_state_dict")


def restores_itself(data: Any, state: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has a position that the loader saved, and the loader can restore it."""
    return "loader" in state and is_stateful(data)
