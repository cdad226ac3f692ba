"""Starts a pass over data in the middle: batches are skipped at the sampler, if there is one, without loading them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from camshaft.resume.loader_parts import generator_states, restore_generators
from camshaft.rng import preserve_rng_state

__all__ = ["can_skip_at_sampler", "has_persistent_workers", "skip_batches", "start_workers", "workers_are_alive"]

logger = logging.getLogger("camshaft")


def can_skip_at_sampler(data: Any) -> bool:
    """Whether batches can be skipped without loading them."""
    return isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)


def skip_batches(data: Any, taken: int) -> Iterator[Any]:
    """A new pass over ``data`` without its first ``taken`` batches.

    Raises:
        RuntimeError: if the data has fewer batches.
    """
    if can_skip_at_sampler(data):
        return skip_at_sampler(data, taken)
    if taken and not isinstance(data, (list, tuple)):
        logger.warning(
            "resume: %s can't start in the middle of a pass; %d batches are loaded and skipped", type(data).__name__, taken
        )
    iterator: Iterator[Any] = iter(data)
    for number in range(taken):
        try:
            next(iterator)
        except StopIteration:
            raise RuntimeError(f"resume: the data ended after {number} of the {taken} batches taken before") from None
    return iterator


class SkippingSampler:
    """A sampler that skips the first indices of another one.

    Args:
        sampler: the other sampler.
        skip: the number of draws to skip in each pass.
    """

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self.sampler, self.skip = sampler, skip
        self.passes: list[SkippingIterator] = []

    def __iter__(self) -> Iterator[Any]:
        self.passes.append(SkippingIterator(iter(self.sampler), self.skip))
        return self.passes[-1]

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class SkippingIterator:
    """One pass over a :class:`SkippingSampler`."""

    def __init__(self, draws: Iterator[Any], skip: int) -> None:
        self.draws, self.skip = draws, skip

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.advance()
        return next(self.draws)

    def advance(self) -> None:
        """Draws what must be skipped."""
        while self.skip:
            next(self.draws)
            self.skip -= 1


def skip_at_sampler(loader: DataLoader[Any], taken: int) -> Iterator[Any]:
    """A pass over a copy of the loader whose sampler has been advanced; skipped batches are not loaded."""
    skipping = SkippingSampler(loader._index_sampler, taken)
    workers = loader._iterator if has_persistent_workers(loader) else None
    if workers is None:
        iterator: Any = iter(with_sampler(loader, skipping))
    else:  # the workers are running already, and begin a new pass
        workers._index_sampler = skipping
        iterator = iter(loader)
    for draws in skipping.passes:
        draws.advance()  # now, because without workers the sampler would draw its order only for the first batch
    if has_persistent_workers(loader):
        adopt_workers(iterator, loader)
    advanced: Iterator[Any] = iterator
    return advanced


def with_sampler(loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    """A copy of a loader with another sampler of indices; the loader does not change."""
    twin = copy.copy(loader)
    attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
    twin.__dict__ |= {attribute: sampler, "_iterator": None}  # a loader does not allow to assign these attributes
    return twin


# -- persistent workers -----------------------------------------------------------------------------------------------


def has_persistent_workers(data: Any) -> bool:
    """Whether it is a loader that keeps its workers between passes; these draw no new seed for a later pass."""
    return isinstance(data, DataLoader) and data.persistent_workers and data.num_workers > 0


def workers_are_alive(data: Any) -> bool:
    """Whether a loader's persistent workers have been started."""
    return has_persistent_workers(data) and data._iterator is not None


def start_workers(loader: DataLoader[Any]) -> None:
    """Starts a loader's persistent workers without asking for a batch, as they were when the checkpoint was written."""
    if loader._iterator is None:
        with preserve_rng_state():
            states = generator_states(loader)
            adopt_workers(iter(with_sampler(loader, [])), loader)
            restore_generators(loader, states)


def adopt_workers(iterator: Any, loader: DataLoader[Any]) -> None:
    """Makes an iterator with its workers the loader's own, for later passes."""
    iterator._index_sampler = loader._index_sampler
    loader._iterator = iterator
