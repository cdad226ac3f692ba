"""Ends a run in an orderly way on a signal."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from camshaft.events import Events, Priority
from camshaft.handler import Handler, on, stop

__all__ = ["StopOnSignal"]

CHILD_ENDED = getattr(signal, "SIGCHLD", None)


class StopOnSignal(Handler):
    """Ends the run in an orderly way on SIGTERM or Ctrl-C, and then exits the process.

    On a signal the open window is completed, ``COMPLETED`` handlers run, a checkpoint is saved and logs are flushed. Then the
    process exits with the usual code: 143 for SIGTERM, 130 for SIGINT. A second signal exits immediately. The earlier signal
    handlers are restored when the run ends. Forked workers of a data loader ignore the signals. With several processes a
    signal to one rank ends the run on all of them, with the same exit code.

    Args:
        signals: the signals to handle.

    Raises:
        ValueError: if an element is not a signal.

    Example:
        >>> stop = StopOnSignal()
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        try:
            self.signals = tuple(signal.Signals(number) for number in signals)
        except (TypeError, ValueError):
            raise ValueError(f"signals must be a sequence such as (signal.SIGTERM, signal.SIGINT), got {signals!r}") from None
        if not self.signals:
            raise ValueError("signals must name at least one signal")
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._process = 0

    @on(Events.STARTED)
    def listen(self, engine: Any) -> None:
        """Installs the signal handlers, which only the main thread can do."""
        self.received = engine.exit_code = engine.ending = None
        if threading.current_thread() is not threading.main_thread():
            warnings.warn("StopOnSignal can listen only in the main thread; this run will not stop on signals", stacklevel=2)
            return
        self._process = os.getpid()
        if not self._before:
            self._before = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked worker, which the trainer ends
            return
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        self.engine.ending = f"{self.received.name} received"
        if CHILD_ENDED is not None and CHILD_ENDED not in self._before:
            # A signal to the process group ends the workers too, for which torch would raise in the middle of a step. A
            # function replaces torch's: with SIG_DFL, Python prints a traceback if a worker has ended at the same time.
            self._before[CHILD_ENDED] = signal.signal(CHILD_ENDED, _ignore)

    @on(Events.ITERATION_COMPLETED, priority=Priority.JUDGE)
    def stop_if_received(self, engine: Any) -> None:
        """Ends the run if a signal was received and no window is open."""
        if self.received is not None and not getattr(engine, "window_is_open", False):
            self._stop(engine)

    @on(Events.EPOCH_COMPLETED, priority=Priority.JUDGE)
    def stop_after_epoch(self, engine: Any) -> None:
        """Ends the run after an epoch if a signal was received."""
        if self.received is not None:
            self._stop(engine)

    def _stop(self, engine: Any) -> None:
        assert self.received is not None
        engine.exit_code = 128 + self.received
        stop(engine, engine.ending)

    @on(Events.INTERRUPT, priority=Priority.SAVE + 1)
    def restore_while_interrupted(self, engine: Any) -> None:
        """Restores the earlier signal handlers until the run continues."""
        self.restore(engine)
        engine.add_event_handler(Events.ITERATION_STARTED, self._listen_again)

    def _listen_again(self, engine: Any) -> None:
        engine.remove_event_handler(self._listen_again, Events.ITERATION_STARTED)
        self.listen(engine)

    @on(Events.TERMINATE, priority=Priority.SAVE + 1)
    def restore_without_completed(self, engine: Any) -> None:
        """Restores the earlier signal handlers at the end of a run without ``COMPLETED``."""
        if engine.should_terminate == "skip_completed":
            self.restore(engine)

    @on(Events.COMPLETED | Events.EXCEPTION_RAISED, priority=Priority.SAVE + 1)
    def restore(self, engine: Any, *_: Any) -> None:
        """Restores the earlier signal handlers, and sets the exit code if a signal was received."""
        self._restore()
        if self.received is not None:
            engine.exit_code = 128 + self.received

    def on_detach(self, engine: Any) -> None:
        """Restores the earlier signal handlers."""
        self._restore()
        if engine.has_event_handler(self._listen_again, Events.ITERATION_STARTED):
            engine.remove_event_handler(self._listen_again, Events.ITERATION_STARTED)

    def _restore(self) -> None:
        if self._before and threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                signal.signal(number, before)
        self._before = {}


def _ignore(number: int, frame: Any) -> None:
    """A signal handler that does nothing."""
