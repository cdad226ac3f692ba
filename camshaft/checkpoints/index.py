"""Which checkpoints a folder holds, and in which order they were saved."""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from camshaft.checkpoints.file_load import load_checked, read_json
from camshaft.checkpoints.files import MANIFEST, CheckpointError, version_of, write_durably
from camshaft.checkpoints.names import EARLIEST_TIME, step_of
from camshaft.checkpoints.recovery import complete_copies, temporary_folders
from camshaft.validation import join_names

__all__ = ["Entry", "INDEX", "Index", "read_index"]

logger = logging.getLogger("camshaft")

INDEX = "checkpoints.json"

SHOWN = 5
"""The number of names that a warning lists."""

RETRIES = 10
"""How often a checkpoint is looked for if a running job replaces it."""


@dataclass
class Entry:
    """One checkpoint in the index.

    Raises:
        ValueError: if a field has a wrong type or range, or the name is not that of a checkpoint of this step.
    """

    file: str
    optimizer_step: int
    iteration: int
    epoch: int
    score: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    time: str = ""
    """When it was saved, in ISO format: for people. The order does not depend on it."""
    written: int = 0
    """The number of this save in its folder, from 1: it tells which checkpoint is newer."""
    mode: str | None = None
    """Whether the ``"max"`` or the ``"min"`` score is the best; ``None`` without a score, or if an earlier version wrote it."""

    def __post_init__(self) -> None:
        for name in ("optimizer_step", "iteration", "epoch", "written"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        if not isinstance(self.file, str) or step_of(self.file) != self.optimizer_step:
            raise ValueError(f"file must be the name of a checkpoint of step {self.optimizer_step}, got {self.file!r}")
        if self.score is not None and not is_finite(self.score):
            raise ValueError(f"score must be a finite number, got {self.score!r}")
        if self.mode not in (None, "max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {self.mode!r}")
        if not isinstance(self.time, str):
            raise ValueError(f"time must be a text, got {self.time!r}")
        if not isinstance(self.metrics, dict) or not all(
            isinstance(name, str) and (value is None or is_finite(value)) for name, value in self.metrics.items()
        ):
            raise ValueError("metrics must be finite numbers by name")

    @property
    def order(self) -> tuple[int, int]:
        """Sorts checkpoints by the number of the save. Those of earlier versions have none, and sort before by step."""
        return (0, self.optimizer_step) if self.written >= EARLIEST_TIME else (1, self.written)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite ``int`` or ``float``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class _Mark(NamedTuple):
    """What a checkpoint says about itself: the identity of the folder for which it was written, and its entry."""

    identity: str
    entry: Entry


def read_index(path: Path) -> tuple[str, list[Entry]]:
    """Reads an index file. Nothing but names of checkpoints is accepted from it: a log entry names what is ignored.

    Returns:
        The folder's identity, and its checkpoints, oldest first.

    Raises:
        FileNotFoundError: if it does not exist.
        CheckpointError: if it cannot be read, or is not as it was written.
    """
    try:
        content = read_json(path)
        if content.pop("crc32") != _sum(content):
            raise ValueError("its text doesn't match its checksum")
        if not isinstance(content["identity"], str):
            raise ValueError("identity must be a text")
        return content["identity"], _entries(content["checkpoints"], path)
    except FileNotFoundError:
        raise
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def _entries(listed: list[dict[str, Any]], path: Path) -> list[Entry]:
    entries, ignored = {}, []
    for item in listed:
        try:
            entry = Entry(**item)
        except (TypeError, ValueError, OverflowError):
            ignored.append(repr(item.get("file") if isinstance(item, dict) else item)[:100])
        else:
            entries[entry.file] = entry
    if ignored:
        logger.warning("%s lists what is not a checkpoint of this folder; ignored: %s", path, join_names(ignored, SHOWN))
    return in_order(list(entries.values()))


def in_order(entries: list[Entry]) -> list[Entry]:
    """Entries, oldest first. Those of earlier versions have no number and keep their order in the index."""
    return sorted(entries, key=lambda entry: (1, entry.written) if entry.written < EARLIEST_TIME else (0, 0))


class Index:
    """``checkpoints.json``: the folder's checkpoints, oldest first. Nothing is written before :meth:`write`.

    The file is a hint that saves time. What it lacks is found by the names in the folder, and what each checkpoint says about
    itself. What it names and is not a checkpoint in this folder is ignored.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Entry] = []
        self.identity = uuid.uuid4().hex
        """Marks the checkpoints that were written for this folder."""
        self._read()
        self.saves = max((entry.written for entry in self.entries if entry.written < EARLIEST_TIME), default=0)
        """The highest number of a save so far."""

    @property
    def path(self) -> Path:
        """The index file."""
        return self.folder / INDEX

    def names(self) -> set[str]:
        """The names of the checkpoints that are in the folder now, also of those that have only a temporary name."""
        first, second = (names_in(self.folder).union(temporary_folders(self.folder).values()) for _ in range(2))
        return first | second  # a folder that is renamed while it is listed may be missing from one of the two

    def path_of(self, name: str) -> Path:
        """The path of a checkpoint: a temporary one if a sharded checkpoint is being replaced, or its process was killed."""
        path = self.folder / name
        if name.endswith(".pt") or path.exists():
            return path
        return complete_copies(self.folder).get(name, path)

    def _read(self) -> None:
        try:
            self.identity, self.entries = read_index(self.path)
        except FileNotFoundError:
            return self._rebuild()
        except CheckpointError as error:
            logger.warning("%s, and is rebuilt from the checkpoints", error)
            return self._rebuild()
        links = names_in(self.folder, links=True)
        self.entries = [entry for entry in self.entries if entry.file not in links]
        for mark in self._unlisted():
            if mark.identity == self.identity:
                self._insert(mark.entry)
        names = self.names()
        if not any(entry.file in names for entry in self.entries):
            self.entries = []  # somebody has cleared the folder; if only some are missing, a resume must name them
        return None

    def _rebuild(self) -> None:
        """Lists the checkpoints by what they say about themselves.

        If some were copied from another folder, this one's are those with the latest time: numbers of two folders cannot be
        compared. Within one folder the time does not count.
        """
        found = self._unlisted()
        self.entries = []
        if found:
            self.identity = max(found, key=lambda mark: mark.entry.time).identity
            self.entries = [mark.entry for mark in found if mark.identity == self.identity]

    def _unlisted(self) -> list[_Mark]:
        """The good checkpoints that the index lacks, because of a kill between two writes, oldest first."""
        names = self.names() - {entry.file for entry in self.entries}
        found = [mark for mark in map(self._mark_of, names) if mark is not None]
        return sorted(found, key=lambda mark: mark.entry.order)

    def _mark_of(self, name: str) -> _Mark | None:
        """What a checkpoint says about itself; ``None`` if it is damaged, or a copy under another name, which is the user's."""
        for _ in range(RETRIES):
            path = self.path_of(name)
            before = version_of(path)
            with suppress(CheckpointError, OSError, KeyError, TypeError, ValueError, OverflowError):
                mark = load_checked(path / MANIFEST if path.is_dir() else path)["rotation"]
                entry = Entry(**mark["entry"])
                return _Mark(mark["identity"], entry) if entry.file == name and isinstance(mark["identity"], str) else None
            if version_of(path) == before is not None:
                break
        return None  # or it was replaced again and again by a running job

    def _insert(self, entry: Entry) -> None:
        """Adds an unlisted entry: the kill may have come before the index was written, or before an old file was deleted."""
        older = [number for number, other in enumerate(self.entries, start=1) if other.order <= entry.order]
        self.entries.insert(older[-1] if older else 0, entry)

    def write(self, without: str = "") -> None:
        """Writes the index durably.

        Args:
            without: the name of a checkpoint that is left out, because it is about to be replaced.
        """
        listed = [dict(vars(entry)) for entry in self.entries if entry.file != without]
        content = {"format": 1, "identity": self.identity, "checkpoints": listed}
        text = json.dumps(content | {"crc32": _sum(content)}, indent=1, allow_nan=False).encode()
        write_durably(self.path, lambda file: _put(file, text))

    def add(self, entry: Entry) -> None:
        """Adds the checkpoint that was just saved, in place of one of the same name; drops those whose file is gone."""
        names = self.names()
        self.entries = [other for other in self.entries if other.file != entry.file and other.file in names] + [entry]

    def newest_first(self) -> list[Path]:
        """Every checkpoint in the folder, listed or not, newest first."""
        listed = [entry.file for entry in self.entries]
        newest_step = max((entry.optimizer_step for entry in self.entries), default=-1)
        others = sorted(self.names().difference(listed), key=lambda name: step_of(name) or 0)
        newer = [name for name in others if (step_of(name) or 0) > newest_step]
        older = [name for name in others if (step_of(name) or 0) <= newest_step]
        return [self.path_of(name) for name in reversed(older + listed + newer)]


def names_in(folder: Path, links: bool = False) -> set[str]:
    """The names of the checkpoints in a folder; or of symbolic links, which are not followed: they may lead out of it."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        return {item.name for item in items if step_of(item.name) is not None and item.is_symlink() == links}
    return set()


def _sum(content: Mapping[str, Any]) -> int:
    """A checksum of the index, which reveals a changed digit."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _put(file: Any, text: bytes) -> None:
    file.write(text)
