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
from camshaft.distributed.collectives import all_gather_object, on_rank_zero, world_size

__all__ = ["best_of", "last_of", "load_chosen"]

Result = TypeVar("Result")


def last_of(index: Index) -> Path | None:
    """The newest checkpoint."""
    return index.path_of(index.entries[-1].file) if index.entries else None


def best_of(index: Index, mode: str) -> Path | None:
    """The checkpoint with the best score."""
    ranked = best_first(index.entries, mode)
    return index.path_of(ranked[0].file) if ranked else None


def load_chosen(
    index_of: Callable[[], Index], which: str | os.PathLike[str], mode: str, reference: Reference
) -> tuple[Path | None, Any]:
    """Reads the checkpoint that is asked for. Every rank must call it; rank 0 chooses.

    A running job may delete a checkpoint between the choice and the reading. Then the folder is looked at again.

    Args:
        index_of: reads what the folder holds now.
        which: ``"auto"``, ``"best"`` or a path.
        mode: whether the ``"max"`` or the ``"min"`` score is the best.
        reference: see :func:`~camshaft.checkpoints.sharded_load.load_shards`.

    Returns:
        The path and the content; both ``None`` for ``"auto"`` in a folder without any checkpoint.

    Raises:
        CheckpointError: if the checkpoint cannot be used, or none in the folder can.
        FileNotFoundError: if the path does not exist.
    """
    if which == "auto":
        return load_newest(index_of, reference)
    if which != "best":
        path = on_rank_zero(lambda: existing(which))
        return path, read(path, reference)
    path = on_rank_zero(lambda: existing_best(index_of(), mode))
    while True:
        try:
            return path, read(path, reference)
        except CheckpointError:
            tried, path = path, on_rank_zero(lambda: existing_best(index_of(), mode))
            if path == tried:
                raise


def load_newest(index_of: Callable[[], Index], reference: Reference) -> tuple[Path | None, Any]:
    """The newest checkpoint that can be used; a warning names those that are passed over, and why."""
    tried: list[Path] = []
    passed_over: list[str] = []
    while (paths := on_rank_zero(lambda: index_of().newest_first())) != tried:
        tried, passed_over = paths, []
        for path in paths:
            try:
                content = read(path, reference)
            except CheckpointError as error:
                passed_over.append(str(error))
                continue
            if passed_over:
                warnings.warn(f"resumed from {path}; passed over: {'; '.join(passed_over)}", RuntimeWarning, stacklevel=4)
            return path, content
    if passed_over:
        raise CheckpointError(f"no checkpoint in {tried[0].parent} can be used: {'; '.join(passed_over)}")
    return None, None


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
