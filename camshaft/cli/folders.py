"""Finds where a run keeps its checkpoints and its event files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from camshaft.checkpoints.index import INDEX
from camshaft.checkpoints.names import step_of
from camshaft.validation import join_names

__all__ = ["Folders", "NoRun", "find_folders", "has_checkpoints", "has_events", "is_run"]


SHOWN = 12
"""The number of runs that an error names."""


class NoRun(ValueError):
    """A path is not a run; the text says what was looked for."""


@dataclass(frozen=True)
class Folders:
    """The folders of one run."""

    run: Path
    """The path that was given."""
    checkpoints: Path | None
    """The folder of ``checkpoints.json`` and the checkpoints."""
    events: Path | None
    """The folder of TensorBoard's event files."""


def has_checkpoints(folder: Path) -> bool:
    """Whether a folder holds the checkpoints of a run, or at least their index."""
    return (folder / INDEX).is_file() or any(step_of(path.name) is not None for path in folder.glob("step-*"))


def has_events(folder: Path) -> bool:
    """Whether TensorBoard would find a run in a folder."""
    return any(folder.glob("events.out.tfevents.*"))


def is_run(folder: Path) -> bool:
    """Whether a folder holds what a run writes."""
    return has_events(folder) or any(has_checkpoints(inner) for inner in folder.glob("*/"))


def find_folders(run: Path) -> Folders:
    """Finds what belongs to a run.

    Args:
        run: the run's folder, with event files, a folder of checkpoints or both in it; or the folder of checkpoints itself,
            and then the event files next to it belong to it.

    Returns:
        The folders.

    Raises:
        NoRun: if the path is neither, or could be several runs.

    Example:
        >>> import tempfile
        >>> find_folders(Path(tempfile.mkdtemp()) / "misspelt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        camshaft.cli.folders.NoRun: ...misspelt does not exist; give a run's folder such as runs/mnist, ...
    """
    if not run.is_dir():
        problem = "is a file" if run.exists() else "does not exist"
        raise NoRun(f"{run} {problem}; give a run's folder such as runs/mnist, or its folder of checkpoints")
    if has_checkpoints(run):
        parent = run.resolve().parent
        return Folders(run, run, run if has_events(run) else parent if has_events(parent) else None)
    inner = sorted(folder for folder in run.iterdir() if folder.is_dir() and has_checkpoints(folder))
    if len(inner) > 1:
        raise NoRun(f"{run} has several folders of checkpoints; give one of {', '.join(map(str, inner))}")
    if inner or has_events(run):
        return Folders(run, inner[0] if inner else None, run if has_events(run) else None)
    runs = sorted(str(folder) for folder in run.iterdir() if folder.is_dir() and is_run(folder))
    if runs:
        raise NoRun(f"{run} is a folder of runs; give one of them: {join_names(runs, SHOWN)}")
    raise NoRun(
        f"{run} is neither a run's folder (no event files of TensorBoard and no folder of checkpoints in it) "
        f"nor a folder of checkpoints (no {INDEX} and no step-... in it)"
    )
