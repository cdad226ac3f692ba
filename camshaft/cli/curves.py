"""What TensorBoard's event files hold of a run, read with TensorBoard's own reader."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Curve", "Curves", "Events", "Point", "is_learning_rate", "read_events"]

LEARNING_RATE = re.compile(r"(^|/)lr(/|$)")
ENDING = "ended/text_summary"
CYCLE = "cycle/text_summary"


class Point(NamedTuple):
    """One point of a curve."""

    step: int
    value: float


Curve = Sequence[Point]
Curves = Mapping[str, Curve]


class Events(NamedTuple):
    """The scalars of a run by name, and why it ended."""

    scalars: Curves
    ending: str | None


def is_learning_rate(name: str) -> bool:
    """Whether a curve is a learning rate: ``lr``, ``train/lr``, ``train/lr/head``, ``train/generator/lr``."""
    return LEARNING_RATE.search(name) is not None


def read_events(folder: Path) -> Events:
    """Reads the event files of a folder; what a resumed run has hidden stays hidden.

    Args:
        folder: the folder with the event files.

    Returns:
        Every scalar by name, each in the order of its steps; and the reason for the end, where the latest run has one.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 1, "histograms": 1})
    reader.Reload()
    return Events(read_curves(reader), ending_of(reader))


def read_curves(reader: Any) -> dict[str, list[Point]]:
    """Every scalar of an ``EventAccumulator`` by name."""
    return {name: [Point(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def ending_of(reader: Any) -> str | None:
    """What the handler ``TensorBoard`` has written at the end; ``None`` where a later run of the folder hasn't ended."""
    texts = reader.Tags()["tensors"]
    if ENDING not in texts:
        return None
    ending = reader.Tensors(ENDING)[-1]
    if CYCLE in texts and reader.Tensors(CYCLE)[-1].wall_time > ending.wall_time:
        return None
    return str(ending.tensor_proto.string_val[0].decode())
