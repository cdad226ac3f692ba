"""What TensorBoard's event files hold of a run, read with TensorBoard's own reader."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from camshaft.tensorboard_tags import CYCLE, ENDED

__all__ = ["Curve", "Curves", "Events", "NO_EVENTS", "Point", "is_learning_rate", "read_events"]

LEARNING_RATE = re.compile(r"(^|/)lr(/|$)")


class Point(NamedTuple):
    """One point of a curve."""

    step: int
    value: float


Curve = Sequence[Point]
Curves = Mapping[str, Curve]


class Events(NamedTuple):
    """What the event files of a run hold."""

    scalars: Curves
    """Every scalar by name, each in the order of its steps."""
    began: float
    """When the latest run in the folder began, in seconds; 0 where that isn't known."""
    ending: str | None
    """Why the latest run ended; ``None`` if it has not, or could not say so."""


NO_EVENTS = Events({}, 0.0, None)


def is_learning_rate(name: str) -> bool:
    """Whether a curve is a learning rate: ``lr``, ``train/lr``, ``train/lr/head``, ``train/generator/lr``."""
    return LEARNING_RATE.search(name) is not None


def read_events(folder: Path) -> Events:
    """Reads the event files of a folder; what a resumed run has hidden stays hidden.

    Args:
        folder: the folder with the event files.

    Returns:
        The scalars, when the latest run began, and why it ended.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 1, "histograms": 1})
    reader.Reload()
    scalars = {name: [Point(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
    began, ended = latest_text(reader, CYCLE), latest_text(reader, ENDED)
    is_over = ended is not None and (began is None or began.wall_time <= ended.wall_time)
    ending = ended.tensor_proto.string_val[0].decode() if ended is not None and is_over else None
    return Events(scalars, 0.0 if began is None else began.wall_time, ending)


def latest_text(reader: Any, name: str) -> Any:
    """The latest event of a text; ``None`` if there is none."""
    tag = f"{name}/text_summary"
    return reader.Tensors(tag)[-1] if tag in reader.Tags()["tensors"] else None
