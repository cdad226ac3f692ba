"""When a checkpoint is due, and which score it gets: decisions without an engine, a file or another process."""

from __future__ import annotations

import math
import time

__all__ = ["Moment", "SavePolicy"]

Moment = tuple[int, bool]
"""The number of iterations, and whether the epoch is open: nothing is new while both are the same."""


class SavePolicy:
    """Remembers what was requested and what was saved, and tells when the next checkpoint is due.

    Args:
        every_minutes: a checkpoint is due when this many minutes have passed since the last one; ``None`` for never.
    """

    def __init__(self, every_minutes: float | None) -> None:
        self.every_minutes = every_minutes
        self.start(None)

    def start(self, resumed_at: Moment | None) -> None:
        """Begins a run. A new one has saved nothing yet; one that was resumed has nothing new."""
        self.requested = False
        self._saved_at = resumed_at
        self._saved_when = time.monotonic()
        self._score: tuple[int, float] | None = None
        self._last_saved_score: tuple[int, float | None] = -1, None

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint was requested, or the last one is too old."""
        if self.requested or self.every_minutes is None:
            return self.requested
        return time.monotonic() - self._saved_when >= self.every_minutes * 60

    def is_new(self, moment: Moment) -> bool:
        """Whether anything has happened since the last checkpoint."""
        return self._saved_at != moment

    def note_score(self, score: float, step: int, window_is_open: bool) -> bool:
        """Notes a new score for the next checkpoint. Inside a window that is the checkpoint at the window's end.

        Returns:
            Whether the score is finite; another one is ignored.
        """
        if math.isfinite(score):
            self._score = step + window_is_open, score
        return math.isfinite(score)

    def take_score(self, step: int, window_is_open: bool) -> float | None:
        """The score of the checkpoint that is about to be saved; ``None`` if there is none for these weights.

        A checkpoint that is saved again without a new score keeps its score: the weights are the same.
        """
        score = self._last_saved_score[1] if self._last_saved_score[0] == step else None
        if self._score is not None and self._score[0] == step + window_is_open:
            score, self._score = self._score[1], None
        self._last_saved_score = step, score
        return score

    def saved(self, moment: Moment) -> None:
        """Called after each save that has not failed."""
        self._saved_at, self._saved_when = moment, time.monotonic()
