"""Ends a run in an orderly way before a time limit."""

from __future__ import annotations

import time
from typing import Any

from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, on, stop
from camshaft.validation import check_positive

__all__ = ["TimeLimit"]


class TimeLimit(Handler):
    """Ends the run before a job's time limit: the window is completed, ``COMPLETED`` handlers run, a checkpoint is saved.

    After each optimizer step it compares the time left with twice the longest step plus twice the longest save so far. The
    clock starts when the handler is created, so create it at the top of the script, when the job starts.

    Args:
        hours: the limit; may be a fraction.

    Raises:
        ValueError: if ``hours`` is not positive.

    Example:
        >>> limit = TimeLimit(hours=11.5)
    """

    def __init__(self, hours: float) -> None:
        self.hours = check_positive(hours, "hours")
        self._began = time.monotonic()
        self._last = self._began
        self._longest_step = 0.0

    @property
    def seconds_left(self) -> float:
        """The time until the limit, in seconds."""
        return self._began + self.hours * 3600 - time.monotonic()

    @on(Events.STARTED | Events.EPOCH_STARTED)
    def begin(self, engine: Any) -> None:
        """Starts the clock of a step: the time between epochs does not count."""
        self._last = time.monotonic()

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED | StepEvents.OPTIMIZER_STEP_SKIPPED, priority=Priority.JUDGE)
    def time_step(self, engine: Any) -> None:
        """Records how long a window takes, including its data."""
        now = time.monotonic()
        self._longest_step, self._last = max(self._longest_step, now - self._last), now

    @on(Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED, priority=Priority.JUDGE)
    def stop_if_due(self, engine: Any) -> None:
        """Ends the run if another step and a save may not fit, and no window is open."""
        if not engine.window_is_open and self.seconds_left < 2 * (self._longest_step + self._longest_save(engine)):
            stop(engine, f"time limit of {self.hours:g} hours")

    @staticmethod
    def _longest_save(engine: Any) -> float:
        return max((handler.longest_save for handler in engine.handlers.values()), default=0.0)
