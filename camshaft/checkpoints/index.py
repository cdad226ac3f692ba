"""Which checkpoints a folder holds, in what order they were written, and which of them are kept."""

from __future__ import annotations

import json
import logging
import uuid
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import MANIFEST, CheckpointError, write_durably
from camshaft.checkpoints.names import step_of

__all__ = ["Entry", "INDEX", "Index", "best_first", "read_index", "retained"]

logger = logging.getLogger("camshaft")

INDEX = "checkpoints.json"


@dataclass
class Entry:
    """One checkpoint in the index."""

    file: str
    optimizer_step: int
    iteration: int
    epoch: int
    score: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    time: str = ""
    written: int = field(default_factory=time_ns)
    """When it was made, in nanoseconds: tells the place of a file that the index doesn't list."""


class _Marked(NamedTuple):
    """What a checkpoint says of itself: the folder that it was written for, and its entry in the index there."""

    identity: str
    entry: Entry


def best_first(entries: Iterable[Entry], mode: str) -> list[Entry]:
    """The entries with a score, best first; of equal ones the earlier first."""
    scored = [entry for entry in entries if entry.score is not None]
    return sorted(scored, key=lambda entry: entry.score or 0.0, reverse=mode == "max")


def retained(entries: list[Entry], keep_last: int, keep_best: int, mode: str) -> list[Entry]:
    """The last ``keep_last`` and the best ``keep_best`` entries, in the order in which they were written."""
    chosen = [*entries[max(len(entries) - keep_last, 0) :], *best_first(entries, mode)[:keep_best]]
    files = {entry.file for entry in chosen}
    return [entry for entry in entries if entry.file in files]


def read_index(path: Path) -> tuple[str, list[Entry]]:
    """What an index's file says: the folder's identity, and its checkpoints.

    Raises:
        FileNotFoundError: if it does not exist.
        CheckpointError: if it can't be read, or isn't as it was written.
    """
    try:
        content = json.loads(path.read_text())
        if content.pop("crc32") != _sum(content):
            raise ValueError("its text doesn't match its checksum")
        return content["identity"], [Entry(**entry) for entry in content["checkpoints"]]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


class Index:
    """``checkpoints.json``: the folder's checkpoints, in the order in which they were written.

    Args:
        folder: the folder; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Entry] = []
        self.identity = uuid.uuid4().hex
        """Marks the files that were written for this folder."""
        self._read()

    @property
    def path(self) -> Path:
        """The index's file."""
        return self.folder / INDEX

    def _read(self) -> None:
        try:
            self.identity, self.entries = read_index(self.path)
        except FileNotFoundError:
            return self._make_anew()
        except CheckpointError as error:
            logger.warning("%s and is made again from the checkpoints", error)
            return self._make_anew()
        for marked in self._unlisted():
            if marked.identity == self.identity:
                self._insert(marked.entry)
        if not any((self.folder / entry.file).exists() for entry in self.entries):
            self.entries = []  # somebody has cleared the folder; one that is missing beside others must be named
        return None

    def _make_anew(self) -> None:
        """Lists the files by what they say of themselves; of several folders', those of the one that was written to last."""
        found = self._unlisted()
        self.entries = []
        if found:
            self.identity = found[-1].identity
            self.entries = [marked.entry for marked in found if marked.identity == self.identity]

    def _unlisted(self) -> list[_Marked]:
        """The good checkpoints that the index lacks, because of a kill between two writes, in the order of writing."""
        listed = {entry.file for entry in self.entries}
        found = []
        for path in self.folder.glob("step-*"):
            if path.name not in listed and step_of(path.name) is not None:
                with suppress(CheckpointError, KeyError, TypeError):
                    mark = load_checked(path / MANIFEST if path.is_dir() else path)["rotation"]
                    marked = _Marked(mark["identity"], Entry(**mark["entry"]))
                    if marked.entry.file == path.name:  # a copy under another name is the user's
                        found.append(marked)
        return sorted(found, key=lambda marked: marked.entry.written)

    def _insert(self, entry: Entry) -> None:
        """Puts an entry in its place: the kill may have come before the index was written, or before an old file went."""
        later = [n for n, other in enumerate(self.entries, start=1) if other.written <= entry.written]
        self.entries.insert(later[-1] if later else 0, entry)

    def write(self) -> None:
        """Writes the index durably."""
        content = {"format": 1, "identity": self.identity, "checkpoints": [asdict(entry) for entry in self.entries]}
        text = json.dumps(content | {"crc32": _sum(content)}, indent=1, allow_nan=False).encode()
        write_durably(self.path, lambda file: _put(file, text))

    def add(self, entry: Entry) -> None:
        """Puts a checkpoint that has been written last; one of the same name gives way, and those that are gone go."""
        others = [other for other in self.entries if other.file != entry.file]
        self.entries = [other for other in others if (self.folder / other.file).exists()] + [entry]

    def newest_first(self) -> list[Path]:
        """Every checkpoint in the folder, listed or not, newest first."""
        listed = [self.folder / entry.file for entry in self.entries]
        newest_step = max((entry.optimizer_step for entry in self.entries), default=-1)
        others = [path for path in self.folder.glob("step-*") if step_of(path.name) is not None and path not in listed]
        others.sort(key=lambda path: step_of(path.name) or 0)
        newer = [path for path in others if (step_of(path.name) or 0) > newest_step]
        older = [path for path in others if path not in newer]
        return list(reversed(older + listed + newer))


def _sum(content: Mapping[str, Any]) -> int:
    """A checksum over the index, so that a changed digit isn't believed."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _put(file: Any, text: bytes) -> None:
    file.write(text)
