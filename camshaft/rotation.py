"""Which checkpoints a folder holds, in what order they were written, and which of them are kept."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from camshaft.files import BadFile, load_checked, write_durably

__all__ = ["Entry", "Index", "file_name", "kept", "step_of"]

INDEX = "checkpoints.json"
NAME = re.compile(r"step-(\d{8,})\.pt")


def file_name(step: int) -> str:
    """The name of the checkpoint of an optimizer step."""
    return f"step-{step:08d}.pt"


def step_of(name: str) -> int | None:
    """The optimizer step in a checkpoint's name; ``None`` for any other file."""
    found = NAME.fullmatch(name)
    return int(found[1]) if found else None


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


def best_first(entries: Iterable[Entry], mode: str) -> list[Entry]:
    """The entries with a score, best first; of equal ones the earlier first."""
    scored = [entry for entry in entries if entry.score is not None]
    return sorted(scored, key=lambda entry: entry.score or 0.0, reverse=mode == "max")


def kept(entries: list[Entry], keep_last: int, keep_best: int, mode: str) -> list[Entry]:
    """The last ``keep_last`` and the best ``keep_best`` entries, in the order in which they were written."""
    chosen = [*entries[max(len(entries) - keep_last, 0) :], *best_first(entries, mode)[:keep_best]]
    files = {entry.file for entry in chosen}
    return [entry for entry in entries if entry.file in files]


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
        self.extra: dict[str, Any] = {}
        self._read()

    @property
    def path(self) -> Path:
        """The index's file."""
        return self.folder / INDEX

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            entries = [Entry(**entry) for entry in content["checkpoints"]]
            identity = str(content["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            return self._adopt(any_identity=True)  # none yet, or a damaged one: the files tell
        self.identity = identity
        self.entries = [entry for entry in entries if (self.folder / entry.file).is_file()]
        return self._adopt(any_identity=False)

    def _adopt(self, any_identity: bool) -> None:
        """Lists the files that a kill kept out of the index: those that were written for this folder."""
        listed = {entry.file for entry in self.entries}
        for path in sorted(self.folder.glob("step-*.pt"), key=lambda path: path.stat().st_mtime_ns):
            if path.name in listed or step_of(path.name) is None:
                continue
            with suppress(BadFile, KeyError, TypeError):
                mark = load_checked(path)["rotation"]
                if any_identity or mark["identity"] == self.identity:
                    self.identity = mark["identity"]
                    self.entries.append(Entry(**mark["entry"]))

    def write(self) -> None:
        """Writes the index durably."""
        content = {"format": 1, "identity": self.identity, "checkpoints": [asdict(entry) for entry in self.entries]}
        text = json.dumps(content | self.extra, indent=1, allow_nan=False).encode()
        write_durably(self.path, lambda file: _put(file, text))

    def add(self, entry: Entry) -> None:
        """Puts a checkpoint that has been written last; one of the same name gives way."""
        self.entries = [other for other in self.entries if other.file != entry.file] + [entry]

    def newest_first(self) -> list[Path]:
        """Every checkpoint in the folder, listed or not, newest first."""
        listed = [self.folder / entry.file for entry in self.entries]
        newest_step = max((entry.optimizer_step for entry in self.entries), default=-1)
        others = [path for path in self.folder.glob("step-*.pt") if step_of(path.name) is not None and path not in listed]
        others.sort(key=lambda path: step_of(path.name) or 0)
        newer = [path for path in others if (step_of(path.name) or 0) > newest_step]
        older = [path for path in others if path not in newer]
        return list(reversed(older + listed + newer))


def _put(file: Any, text: bytes) -> None:
    file.write(text)
