"""Choosing the checkpoint to resume from, and reading it. Nothing here writes."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError, check_name_lengths, version_of
from camshaft.checkpoints.index import Index
from camshaft.checkpoints.retention import best_first
from camshaft.checkpoints.schema import check_content
from camshaft.checkpoints.sharded_load import Reference, load_manifest, load_shards
from camshaft.checkpoints.text import printable
from camshaft.distributed.collectives import all_gather_object, on_rank_zero, world_size

__all__ = ["best_of", "last_of", "load_chosen"]

Result = TypeVar("Result")

SECONDS = 60.0
"""For how long a checkpoint is tried again if a running job replaces it while it is read."""

REPLACED_TOO_OFTEN = "was replaced each time before it could be read: the running job saves too often, or keeps too few"

MOST_REASONS = 20
"""The number of checkpoints that a message names."""


class ReplacedError(Exception):
    """A checkpoint was replaced or deleted while it was read."""


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
    mode_for: Callable[[Index], str],
    reference: Reference,
    restore: Callable[[Any], None],
) -> Path | None:
    """Restores the checkpoint that is asked for. Every rank must call it; rank 0 chooses.

    A running job may delete a checkpoint between the choice and the reading. Then the folder is looked at again.

    Args:
        index_of: reads what the folder holds now.
        which: ``"auto"``, ``"best"`` or a path.
        mode_for: tells whether the ``"max"`` or the ``"min"`` score of an index is the best.
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
    if which == "best":
        return use_settled(lambda: existing_best(index_of(), mode_for), use)
    return use_settled(lambda: existing(which), use)


def use_settled(find: Callable[[], Path], use: Callable[[Path], Path]) -> Path:
    """Restores one checkpoint; tries again if a running job has replaced it in the meantime."""
    found = on_rank_zero(lambda: with_version(find()))
    for _ in attempts():
        try:
            return use(found[0])
        except CheckpointError:
            tried, found = found, on_rank_zero(lambda: with_version(find()))
            if found == tried:
                raise
    raise CheckpointError(f"{found[0]} {REPLACED_TOO_OFTEN}")


def use_newest(index_of: Callable[[], Index], use: Callable[[Path], Path]) -> Path | None:
    """Restores the newest checkpoint that can be used; a warning names those that are passed over, and why."""
    paths: list[Path] = []
    for _ in attempts():
        tried, paths = paths, on_rank_zero(lambda: index_of().newest_first())
        passed_over: list[CheckpointError] = []
        try:
            path = first_usable(paths, use, passed_over, is_settled=paths == tried)
        except ReplacedError:
            continue
        if path is None and passed_over:
            raise unusable(paths[0].parent, passed_over)
        if passed_over:
            text = f"resumed from {path}; passed over: {listing_of(passed_over)}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        return path
    raise CheckpointError(f"{paths[0]} {REPLACED_TOO_OFTEN}")


def first_usable(
    paths: list[Path], use: Callable[[Path], Path], passed_over: list[CheckpointError], is_settled: bool
) -> Path | None:
    """Restores the first of several checkpoints that can be used, and collects the errors of those before it.

    Args:
        paths: the checkpoints.
        use: restores one.
        passed_over: gets the errors.
        is_settled: whether the folder was listed twice with this result, so that a missing one will not come back.

    Raises:
        ReplacedError: if a checkpoint was replaced or deleted in the meantime.
    """
    for path in paths:
        before = on_rank_zero(partial(version_of, path))
        try:
            return use(path)
        except CheckpointError as error:
            after = on_rank_zero(partial(version_of, path))
            if after != before or (after is None and not is_settled):
                raise ReplacedError from None
            passed_over.append(error)
    return None


def attempts() -> Iterator[int]:
    """Counts attempts, for at most a minute on rank 0, but at least three."""
    deadline = time.monotonic() + SECONDS
    for number in itertools.count():
        if not on_rank_zero(lambda: time.monotonic() < deadline) and number >= 3:
            return
        yield number


def unusable(folder: Path, errors: list[CheckpointError]) -> CheckpointError:
    """The error for a folder in which no checkpoint can be used."""
    if isinstance(errors[0], OtherModelError):
        return errors[0]
    return CheckpointError(f"no checkpoint in {folder} can be used: {listing_of(errors)}")


def with_version(path: Path) -> tuple[Path, tuple[int, int] | None]:
    """A path, and what tells the file or folder that has it now from its successors."""
    return path, version_of(path)


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


def existing_best(index: Index, mode_for: Callable[[Index], str]) -> Path:
    """The best checkpoint, if there is one."""
    path = best_of(index, mode_for(index))
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
