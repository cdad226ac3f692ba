"""A run that ends in order before its time is up."""

from __future__ import annotations

import time
from typing import Any

from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, on, stop

__all__ = ["TimeLimit"]


class TimeLimit(Handler):
    """Ends the run before a limit: the window is closed, ``COMPLETED`` handlers run, checkpoints are saved, logs flushed.

    It leaves room for the longest save and the longest optimizer step so far, twice over. The clock starts when the handler is
    made: at the top of a script, that is when the job starts.

    Args:
        hours: the limit; a fraction will do.

    Raises:
        ValueError: if ``hours`` isn't positive.

    Example:
        >>> limit = TimeLimit(hours=11.5)
    """

    def __init__(self, hours: float) -> None:
        if isinstance(hours, bool) or not isinstance(hours, (int, float)) or not hours > 0:
            raise ValueError(f"hours must be a positive number, got {hours!r}")
        self.hours = hours
        self._began = time.monotonic()
        self._last = self._began
        self._longest_step = 0.0

    @property
    def seconds_left(self) -> float:
        """The time until the limit."""
        return self._began + self.hours * 3600 - time.monotonic()

    @on(Events.STARTED | Events.EPOCH_STARTED)
    def begin(self, engine: Any) -> None:
        """Times the steps alone, and not what lies between epochs."""
        self._last = time.monotonic()

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED | StepEvents.OPTIMIZER_STEP_SKIPPED, priority=Priority.JUDGE)
    def time_step(self, engine: Any) -> None:
        """Notes how long a window takes, its data included."""
        now = time.monotonic()
        self._longest_step, self._last = max(self._longest_step, now - self._last), now

    @on(Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED, priority=Priority.JUDGE)
    def look(self, engine: Any) -> None:
        """Ends the run where another step and a save might not fit in, once no window is open."""
        if not engine.window_is_open and self.seconds_left < 2 * (self._longest_step + self._longest_save(engine)):
            stop(engine, f"time limit of {self.hours:g} hours")

    @staticmethod
    def _longest_save(engine: Any) -> float:
        return max((getattr(handler, "longest_save", 0.0) for handler in engine.handlers.values()), default=0.0)
