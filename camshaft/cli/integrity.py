"""Whether the files in a folder of checkpoints are as they were written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from camshaft.checkpoints.files import TEMP_PREFIX, CheckpointError
from camshaft.checkpoints.index import INDEX, read_index
from camshaft.checkpoints.names import step_of
from camshaft.cli.contents import checked

__all__ = ["Integrity", "Verdict", "check_folder", "verdicts"]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one file."""

    file: str
    good: bool
    listed: bool
    """Whether ``checkpoints.json`` lists it."""
    reason: str | None = None
    """What is wrong with it; ``None`` if it is good."""


@dataclass(frozen=True)
class Integrity:
    """What is to be said of a folder of checkpoints."""

    folder: Path
    files: tuple[Verdict, ...]
    """The index, what it lists, in the order of writing, and then what it doesn't."""
    leftovers: tuple[str, ...]
    """Temporary files of saves that were killed; the next run clears them away."""

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
        >>> _ = save_durably({"phases": {}}, folder / "step-00000001.pt")
        >>> [(verdict.file, verdict.good, verdict.listed) for verdict in check_folder(folder).files]
        [('step-00000001.pt', True, False)]
        >>> _ = (folder / "step-00000001.pt").write_bytes(b"damaged")
        >>> check_folder(folder).bad[0].reason
        'is damaged or no checkpoint: File is not a zip file'
    """
    leftovers = sorted(path.name for path in folder.glob(f"{TEMP_PREFIX}*.tmp"))
    return Integrity(folder, tuple(verdicts(folder)), tuple(leftovers))


def verdicts(folder: Path) -> Iterator[Verdict]:
    """The verdicts of :func:`check_folder`, as they come."""
    listed: list[str] = []
    try:
        listed = [entry.file for entry in read_index(folder / INDEX)[1]]
        yield Verdict(INDEX, good=True, listed=False)
    except FileNotFoundError:
        pass  # every file is unlisted then, which is no damage
    except CheckpointError as error:
        yield Verdict(INDEX, good=False, listed=False, reason=without_path(error, folder / INDEX))
    found = {path.name for path in folder.iterdir() if path.suffix == ".pt" or step_of(path.name) is not None}
    unlisted = sorted(found.difference(listed))
    for name in [*listed, *unlisted]:
        reason = problem_of(folder / name)
        yield Verdict(name, good=reason is None, listed=name in listed, reason=reason)


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or with any other file that ``torch.save`` has written."""
    try:
        checked(path)
    except CheckpointError as error:
        return without_path(error, path)
    return None


def without_path(error: CheckpointError, path: Path) -> str:
    """The text of an error, which begins with the path of its file, without it."""
    return str(error).removeprefix(f"{path} ")
