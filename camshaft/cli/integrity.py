"""Whether the files in a folder of checkpoints are as they were written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from camshaft.checkpoints.files import TEMP_PREFIX, CheckpointError
from camshaft.checkpoints.index import INDEX, read_index
from camshaft.checkpoints.names import step_of
from camshaft.cli.contents import checked

__all__ = ["Integrity", "Verdict", "check_folder", "verdicts"]

PAUSES = 10
"""The number of pauses in which a running job may complete a change of the folder."""

PAUSE = 0.1
"""The seconds of each."""


@dataclass(frozen=True)
class Verdict:
    """The result of checking one file."""

    file: str
    good: bool
    listed: bool
    """Whether ``checkpoints.json`` lists it."""
    reason: str | None = None
    """What is wrong with it; ``None`` if it is good."""


@dataclass(frozen=True)
class Integrity:
    """The result of checking a folder of checkpoints."""

    folder: Path
    files: tuple[Verdict, ...]
    """The index, the files that it lists, oldest first, and then the others."""
    leftovers: tuple[str, ...]
    """Temporary files of saves that were killed; the next run deletes them."""

    @property
    def bad(self) -> list[Verdict]:
        """The bad ones."""
        return [verdict for verdict in self.files if not verdict.good]

    def as_json(self) -> dict[str, Any]:
        """The same as plain values for ``json.dumps``."""
        return {
            "folder": str(self.folder),
            "good": not self.bad,
            "files": [asdict(verdict) for verdict in self.files],
            "leftovers": list(self.leftovers),
        }


def check_folder(folder: Path) -> Integrity:
    """Checks every checkpoint in a folder, one after another; nothing is written and no code of a file is run.

    Args:
        folder: the folder of checkpoints.

    Returns:
        The verdicts.

    Example:
        >>> import tempfile, torch
        >>> from camshaft.checkpoints.files import save_durably
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = save_durably({"weight": torch.zeros(1)}, folder / "mine.pt")
        >>> [(verdict.file, verdict.good, verdict.listed) for verdict in check_folder(folder).files]
        [('mine.pt', True, False)]
        >>> _ = (folder / "step-00000001.pt").write_bytes(b"damaged")
        >>> check_folder(folder).bad[0].reason
        'is damaged or no checkpoint: File is not a zip file'
    """
    leftovers = sorted(path.name for path in folder.glob(f"{TEMP_PREFIX}*.tmp"))
    return Integrity(folder, tuple(verdicts(folder)), tuple(leftovers))


def verdicts(folder: Path) -> Iterator[Verdict]:
    """The verdicts of :func:`check_folder`, one after another."""
    index = _ListedFiles(folder / INDEX)
    listed: list[str] = []
    try:
        listed = index.read()
        yield Verdict(INDEX, good=True, listed=False)
    except FileNotFoundError:
        pass  # every file is unlisted then, which is no damage
    except CheckpointError as error:
        yield Verdict(INDEX, good=False, listed=False, reason=without_path(error, folder / INDEX))
    found = {path.name for path in folder.iterdir() if path.suffix == ".pt" or step_of(path.name) is not None}
    is_listed = set(listed)
    for name in [*listed, *sorted(found.difference(listed))]:
        good, reason = check_one(folder / name, index)
        if good or reason is not None:
            yield Verdict(name, good=good, listed=name in is_listed, reason=reason)


def check_one(path: Path, index: _ListedFiles) -> tuple[bool, str | None]:
    """Whether a checkpoint is good, and what is wrong with it.

    A running job may delete or replace it in the meantime. Then the folder is looked at again, and there is no reason if the
    checkpoint does not belong to the folder any more.
    """
    while True:
        before = identity(path)
        reason = problem_of(path)
        if reason is None:
            return True, None
        now = identity(path)
        if now is not None and now == before:
            return False, reason
        if now is None and not index.lists(path.name):
            return False, None
        if not index.pause():
            return False, reason


class _ListedFiles:
    """The names in the index, which is read again if it has changed.

    Args:
        path: the index.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.pauses = path, PAUSES
        self.names: set[str] = set()
        self.version: Any = None

    def read(self) -> list[str]:
        """Reads the index; raises its errors."""
        self.version = identity(self.path)
        names = [entry.file for entry in read_index(self.path)[1]]
        self.names = set(names)
        return names

    def lists(self, name: str) -> bool:
        """Whether the index lists a checkpoint now."""
        if identity(self.path) != self.version:
            with suppress(CheckpointError, OSError):
                self.read()
        return name in self.names

    def pause(self) -> bool:
        """Waits for a running job to complete a change of the folder; ``False`` if there were enough pauses."""
        self.pauses -= 1
        if self.pauses >= 0:
            time.sleep(PAUSE)
        return self.pauses >= 0


def identity(path: Path) -> tuple[int, int] | None:
    """What changes if a file is replaced, or a file is deleted from a folder; ``None`` if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or with any other file that ``torch.save`` has written."""
    try:
        checked(path)
    except FileNotFoundError:
        return "does not exist"
    except (CheckpointError, OSError) as error:
        return without_path(error, path)
    return None


def without_path(error: Exception, path: Path) -> str:
    """The text of an error, which begins with the path of its file, without it."""
    return str(error).removeprefix(f"{path} ")
