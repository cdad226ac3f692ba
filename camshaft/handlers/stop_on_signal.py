"""A run that ends in order when it is asked to by a signal."""

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
    """Ends the run after the open window when a signal comes: ``COMPLETED`` handlers run, checkpoints are saved, logs flushed.

    The process then exits with 143 for SIGTERM and 130 for SIGINT; a second signal quits at once. The handlers of signals that
    were there before are put back when the run ends. Forked data-loading workers don't listen. If several processes train, a
    signal to one of them ends them all, with the same code.

    Args:
        signals: the signals to listen to.

    Raises:
        ValueError: if something else than a signal is given.

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
        """Begins to listen if that is possible."""
        self.received = engine.exit_code = engine.ending = None
        if threading.current_thread() is not threading.main_thread():
            warnings.warn("StopOnSignal can listen only in the main thread; this run will not stop on signals", stacklevel=2)
            return
        self._process = os.getpid()
        if not self._before:
            self._before = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked worker: the trainer will end it
            return
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        self.engine.ending = f"{self.received.name} received"
        if CHILD_ENDED is not None and CHILD_ENDED not in self._before:
            # A signal to the whole group ends the workers too; torch would raise for that in the midst of a step.
            self._before[CHILD_ENDED] = signal.signal(CHILD_ENDED, signal.SIG_DFL)

    @on(Events.ITERATION_COMPLETED, priority=Priority.JUDGE)
    def look(self, engine: Any) -> None:
        """Ends the run where a signal has come and no window is open."""
        if self.received is not None and not getattr(engine, "window_is_open", False):
            self._stop(engine)

    @on(Events.EPOCH_COMPLETED, priority=Priority.JUDGE)
    def look_after_epoch(self, engine: Any) -> None:
        """The same after an epoch."""
        if self.received is not None:
            self._stop(engine)

    def _stop(self, engine: Any) -> None:
        assert self.received is not None
        engine.exit_code = 128 + self.received
        stop(engine, engine.ending)

    @on(Events.INTERRUPT, priority=Priority.SAVE + 1)
    def pause(self, engine: Any) -> None:
        """Stops listening until the run continues, which fires no ``STARTED``."""
        self.leave(engine)
        engine.add_event_handler(Events.ITERATION_STARTED, self._go_on)

    def _go_on(self, engine: Any) -> None:
        engine.remove_event_handler(self._go_on, Events.ITERATION_STARTED)
        self.listen(engine)

    @on(Events.TERMINATE, priority=Priority.SAVE + 1)
    def leave_without_completed(self, engine: Any) -> None:
        """The end of a run whose ``COMPLETED`` was asked to be left out."""
        if engine.should_terminate == "skip_completed":
            self.leave(engine)

    @on(Events.COMPLETED | Events.EXCEPTION_RAISED, priority=Priority.SAVE + 1)
    def leave(self, engine: Any, *_: Any) -> None:
        """Last of all: stops listening and, where a signal has come, has the process exit when the run has ended."""
        self._restore()
        if self.received is not None:
            engine.exit_code = 128 + self.received

    def on_detach(self, engine: Any) -> None:
        """Stops listening."""
        self._restore()
        if engine.has_event_handler(self._go_on, Events.ITERATION_STARTED):
            engine.remove_event_handler(self._go_on, Events.ITERATION_STARTED)

    def _restore(self) -> None:
        if self._before and threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                signal.signal(number, before)
        self._before = {}
