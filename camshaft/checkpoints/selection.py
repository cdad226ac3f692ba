"""Choosing the checkpoint to resume from, and reading it. Nothing here writes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError, check_name_lengths
from camshaft.checkpoints.index import Index
from camshaft.checkpoints.retention import best_first
from camshaft.checkpoints.schema import check_content
from camshaft.checkpoints.sharded_load import Reference, load_manifest, load_shards
from camshaft.checkpoints.text import printable
from camshaft.distributed.collectives import all_gather_object, on_rank_zero, world_size

__all__ = ["best_of", "last_of", "load_chosen"]

Result = TypeVar("Result")

MOST_REASONS = 20
"""The number of checkpoints that a message names."""


class OtherModelError(CheckpointError, ValueError):
    """A checkpoint is of another model, optimizer or scheme than the trainer."""


def last_of(index: Index) -> Path | None:
    """The newest checkpoint."""
    return index.path_of(index.entries[-1].file) if index.entries else None


def best_of(index: Index, mode: str) -> Path | None:
    """The checkpoint with the best score."""
    ranked = best_first(index.entries, mode)
    return index.path_of(ranked[0].file) if ranked else None


def load_chosen(
    index_of: Callable[[], Index],
    which: str | os.PathLike[str],
    mode: str,
    reference: Reference,
    restore: Callable[[Any], None],
) -> Path | None:
    """Restores the checkpoint that is asked for. Every rank must call it; rank 0 chooses.

    A running job may delete a checkpoint between the choice and the reading. Then the folder is looked at again.

    Args:
        index_of: reads what the folder holds now.
        which: ``"auto"``, ``"best"`` or a path.
        mode: whether the ``"max"`` or the ``"min"`` score is the best.
        reference: see :func:`~camshaft.checkpoints.sharded_load.load_shards`.
        restore: restores the trainer from a content, or raises and changes nothing.

    Returns:
        The path; ``None`` for ``"auto"`` in a folder without any checkpoint.

    Raises:
        CheckpointError: if the checkpoint cannot be used, or none in the folder can.
        OtherModelError: if it is of another model, optimizer or scheme; for ``"auto"``, if none can be used and the newest is.
        FileNotFoundError: if the path does not exist.
    """

    def use(path: Path) -> Path:
        content = read(path, reference)
        on_every_rank(lambda: restored(path, content, restore))
        return path

    if which == "auto":
        return use_newest(index_of, use)
    if which != "best":
        return use(on_rank_zero(lambda: existing(which)))
    path = on_rank_zero(lambda: existing_best(index_of(), mode))
    while True:
        try:
            return use(path)
        except CheckpointError:
            tried, path = path, on_rank_zero(lambda: existing_best(index_of(), mode))
            if path == tried:
                raise


def use_newest(index_of: Callable[[], Index], use: Callable[[Path], Path]) -> Path | None:
    """Restores the newest checkpoint that can be used; a warning names those that are passed over, and why."""
    tried: list[Path] = []
    passed_over: list[CheckpointError] = []
    while (paths := on_rank_zero(lambda: index_of().newest_first())) != tried:
        tried, passed_over = paths, []
        for path in paths:
            try:
                use(path)
            except CheckpointError as error:
                passed_over.append(error)
                continue
            if passed_over:
                text = f"resumed from {path}; passed over: {listing_of(passed_over)}"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
            return path
    if passed_over and isinstance(passed_over[0], OtherModelError):
        raise passed_over[0]
    if passed_over:
        raise CheckpointError(f"no checkpoint in {tried[0].parent} can be used: {listing_of(passed_over)}")
    return None


def listing_of(errors: list[CheckpointError]) -> str:
    """The texts of errors in one; of very many only the first."""
    more = f"; and {len(errors) - MOST_REASONS} more" if len(errors) > MOST_REASONS else ""
    return "; ".join(str(error) for error in errors[:MOST_REASONS]) + more


def restored(path: Path, content: Any, restore: Callable[[Any], None]) -> None:
    """Restores a trainer; whatever goes wrong in it is a ``CheckpointError`` that names the file."""
    try:
        restore(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be used: {printable(str(error))}") from error
    except ValueError as error:
        raise OtherModelError(f"{path} can't be resumed here: {printable(str(error))}") from error
    except Exception as error:  # handlers load what they have saved, and may fail in any way
        raise CheckpointError(f"{path} can't be resumed: {type(error).__name__}: {printable(str(error))}") from error


def existing(which: str | os.PathLike[str]) -> Path:
    """A path that the user gives, if something is there."""
    if not isinstance(which, (str, os.PathLike)):
        raise TypeError(f"which must be 'auto', 'best' or the path of a checkpoint, got {which!r}")
    path = Path(which)
    check_name_lengths(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; which must be 'auto', 'best' or the path of a checkpoint")
    return path


def existing_best(index: Index, mode: str) -> Path:
    """The best checkpoint, if there is one."""
    path = best_of(index, mode)
    if path is None:
        raise CheckpointError(f"there is no best checkpoint in {index.folder}: none was saved with a finite score")
    return path


def read(path: Path, reference: Reference) -> Any:
    """The content of a checkpoint. Every rank must call it; an error of one rank is raised on all.

    Raises:
        CheckpointError: if it cannot be used.
    """
    is_sharded, content = on_every_rank(lambda: read_own(path))
    content = load_shards(path, content, reference) if is_sharded else content
    check_content(content, path)
    return content


def read_own(path: Path) -> tuple[bool, Any]:
    """Whether a checkpoint is sharded, and its content: of a sharded one, without its tensors."""
    is_sharded = path.is_dir()
    content = load_manifest(path) if is_sharded else load_checked(path)
    if not isinstance(content, dict) or "phases" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of a trainer")
    return is_sharded, content


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Runs an action on every rank, and raises a ``CheckpointError`` on all of them if it fails on any."""
    problem: Exception | None = None
    try:
        result = action()
    except (CheckpointError, OSError) as error:
        problem = error
    problems = all_gather_object(None if problem is None else str(problem)) if world_size() > 1 else []
    if isinstance(problem, CheckpointError):
        raise problem
    if problem is not None:
        raise CheckpointError(str(problem)) from problem
    for number, text in enumerate(problems):
        if text is not None:
            raise CheckpointError(f"{text} (on rank {number})")
    return result
