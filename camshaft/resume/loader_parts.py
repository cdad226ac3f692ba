"""The random generators and epoch numbers that belong to a data loader: its own, its samplers' and its dataset's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from camshaft.data.seeding import SeededDataset
from camshaft.rng import GENERATORS, encode_generator, restore_generator

__all__ = [
    "distributed_samplers",
    "epochs_of",
    "generator_states",
    "generators_of",
    "parts_of",
    "restore_epochs",
    "restore_generators",
    "seeded_by_epoch",
]


def parts_of(data: Any) -> Iterator[Any]:
    """A loader and the objects in it that may have a random generator of their own."""
    seen: set[int] = set()
    waiting = [data]
    while waiting:
        part = waiting.pop(0)
        if part is None or id(part) in seen or isinstance(part, (list, tuple)):
            continue
        seen.add(id(part))
        yield part
        waiting += [getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset")]


def generators_of(data: Any) -> list[Any]:
    """The random generators that the loader, its samplers and its dataset hold as attributes."""
    values = [value for part in parts_of(data) for value in getattr(part, "__dict__", {}).values()]
    found = [value for value in values if isinstance(value, GENERATORS)]
    return list({id(generator): generator for generator in found}.values())


def generator_states(data: Any) -> list[Any]:
    """The states of :func:`generators_of`."""
    return [encode_generator(generator) for generator in generators_of(data)]


def restore_generators(data: Any, states: list[Any]) -> None:
    """Restores what :func:`generator_states` returned.

    Raises:
        RuntimeError: if the data has another number of generators.
    """
    generators = generators_of(data)
    if len(generators) != len(states):
        raise RuntimeError(
            f"resume: the data has {len(generators)} random generators of its own, but the checkpoint has {len(states)}; "
            "create the loader as before"
        )
    for generator, state in zip(generators, states, strict=True):
        restore_generator(generator, state)


def seeded_by_epoch(data: Any) -> list[Any]:
    """The parts whose order or augmentation depends on ``set_epoch``, such as ``DistributedSampler`` and ``SeededDataset``."""
    return [part for part in parts_of(data) if hasattr(part, "set_epoch") and isinstance(getattr(part, "epoch", None), int)]


def distributed_samplers(data: Any) -> list[Any]:
    """The samplers among :func:`seeded_by_epoch`."""
    return [part for part in seeded_by_epoch(data) if not isinstance(part, SeededDataset)]


def epochs_of(parts: list[Any]) -> list[int]:
    """The epoch that each part was given last."""
    return [part.epoch for part in parts]


def restore_epochs(parts: list[Any], epochs: list[int]) -> None:
    """Gives each part its epoch again."""
    for part, epoch in zip(parts, epochs, strict=False):
        part.set_epoch(epoch)
