"""The contents of TensorBoard's event files."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from camshaft.checkpoints.file_load import open_regular
from camshaft.checkpoints.files import CheckpointError
from camshaft.tensorboard_tags import CYCLE, ENDED

__all__ = ["Curve", "Curves", "Events", "NO_EVENTS", "Point", "is_learning_rate", "read_events"]

LEARNING_RATE = re.compile(r"(^|/)lr(/|$)")
TEXTS = (f"{CYCLE}/text_summary", f"{ENDED}/text_summary")

CHECKED = 1 << 16
"""The largest record, in bytes, whose checksum is verified, which takes long in Python. Scalars have about 40 bytes."""


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
    """When the latest run in the folder began, in seconds; 0 if that is not known."""
    ending: str | None
    """Why the latest run ended; ``None`` if it has not, or could not say so."""


NO_EVENTS = Events({}, 0.0, None)


def is_learning_rate(name: str) -> bool:
    """Whether a curve is a learning rate: ``lr``, ``train/lr``, ``train/lr/head``, ``train/generator/lr``."""
    return LEARNING_RATE.search(name) is not None


def read_events(folder: Path) -> tuple[Events, list[str]]:
    """Reads the event files of a folder; points that a resumed run has hidden stay hidden.

    A file is read as far as it is good. Nothing in it can raise.

    Args:
        folder: the folder with the event files.

    Returns:
        The scalars, when the latest run began, and why it ended; and for each file that can't be read, the reason.
    """
    reader, warnings = _Reader(), []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        try:
            with open_regular(path) as file:
                for record in records_of(file):
                    reader.read(record)
        except (OSError, CheckpointError) as error:
            warnings.append(f"{path} can't be read: {error}" if str(path) not in str(error) else str(error))
    return reader.events(), warnings


def records_of(file: BinaryIO) -> Iterator[bytes]:
    """The records of an event file, up to its end or the first that is damaged."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    left = os.fstat(file.fileno()).st_size
    while len(head := file.read(12)) == 12:
        length, checksum = struct.unpack("<QI", head)
        left -= 16 + length
        if left < 0 or masked_crc32c(head[:8]) != checksum:
            return
        record, (checksum,) = file.read(length), struct.unpack("<I", file.read(4).ljust(4, b"\0"))
        if length <= CHECKED and masked_crc32c(record) != checksum:
            return
        yield record


class _Reader:
    """Collects the scalars and texts of event files, in the order of the files."""

    def __init__(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.parse, self.start = Event.FromString, SessionLog.START
        self.scalars: dict[str, list[Point]] = {}
        self.texts: dict[str, tuple[float, str]] = {}

    def read(self, record: bytes) -> None:
        """Adds an event; one that is none is ignored."""
        try:
            event = self.parse(record)
        except Exception:  # a damaged message can fail in any way
            return
        if event.HasField("session_log") and event.session_log.status == self.start:
            self.hide(event.step)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                self.scalars.setdefault(value.tag, []).append(Point(event.step, value.simple_value))
            elif value.tag in TEXTS and value.HasField("tensor"):
                text = b"".join(value.tensor.string_val[:1]).decode(errors="replace")
                self.texts[value.tag] = event.wall_time, text

    def hide(self, step: int) -> None:
        """Removes the points from a step on: a run was resumed before it."""
        for tag, curve in self.scalars.items():
            if any(point.step >= step for point in curve):
                self.scalars[tag] = [point for point in curve if point.step < step]

    def events(self) -> Events:
        """All that was read."""
        began, ended = self.texts.get(f"{CYCLE}/text_summary"), self.texts.get(f"{ENDED}/text_summary")
        is_over = ended is not None and (began is None or began[0] <= ended[0])
        scalars = {tag: curve for tag, curve in self.scalars.items() if curve}
        return Events(scalars, began[0] if began and math.isfinite(began[0]) else 0.0, ended[1] if ended and is_over else None)
