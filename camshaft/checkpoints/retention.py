"""Which checkpoints a rotation keeps, and which score is good enough to be kept: decisions about numbers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from camshaft.checkpoints.index import Entry

__all__ = ["best_first", "is_among_best", "mode_of", "retained"]


def best_first(entries: Iterable[Entry], mode: str) -> list[Entry]:
    """The entries with a score, best first; of equal scores the earlier first."""
    scored = [entry for entry in entries if entry.score is not None]
    return sorted(scored, key=lambda entry: entry.score or 0.0, reverse=mode == "max")


def mode_of(entries: Sequence[Entry], default: str) -> str:
    """The mode by which the newest score was saved; ``default`` if no entry has one."""
    return next((entry.mode for entry in reversed(entries) if entry.mode is not None), default)


def is_among_best(score: float, entries: Iterable[Entry], keep_best: int, mode: str) -> bool:
    """Whether a new score would be one of the ``keep_best`` best."""
    scores = [entry.score for entry in best_first(entries, mode)[:keep_best] if entry.score is not None]
    return len(scores) < keep_best or any(score > other if mode == "max" else score < other for other in scores)


def retained(entries: Sequence[Entry], keep_last: int, keep_best: int, mode: str) -> list[Entry]:
    """The last ``keep_last`` and the best ``keep_best`` entries, in the order of the saves."""
    chosen = [*entries[max(len(entries) - keep_last, 0) :], *best_first(entries, mode)[:keep_best]]
    files = {entry.file for entry in chosen}
    return [entry for entry in entries if entry.file in files]
