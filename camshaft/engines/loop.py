"""Ignite's engine with a quick loop, handlers in their places, and exceptions that always leave ``run()``."""

from __future__ import annotations

import inspect
import math
import time
import warnings
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine, Events, RemovableEventHandle, State
from ignite.engine.engine import _EngineTerminateException, _EngineTerminateSingleEpochException

from camshaft.events import Filtered, Priority, split
from camshaft.handler import check_takes_engine, stop

__all__ = ["LoopEngine"]

# Enum members are slow to look up by attribute; the loop fires these on every iteration.
GET_BATCH_STARTED = Events.GET_BATCH_STARTED
GET_BATCH_COMPLETED = Events.GET_BATCH_COMPLETED
ITERATION_STARTED = Events.ITERATION_STARTED
ITERATION_COMPLETED = Events.ITERATION_COMPLETED
DATALOADER_STOP_ITERATION = Events.DATALOADER_STOP_ITERATION


class Heard:
    """Which events somebody listens to; one attribute for each, so that asking costs no more than a look-up."""

    if TYPE_CHECKING:  # the attributes are set as events are registered; a real method here would be called at each look-up

        def __getattr__(self, event: str) -> bool: ...


class LoopEngine(Engine):
    """An Ignite engine that costs little where nobody listens.

    What differs from :class:`ignite.engine.Engine`: an exception always leaves :meth:`run`, after every
    ``EXCEPTION_RAISED`` handler has run and with the iteration in a note, and the engine can be run again; handlers have
    places; a filtered bound method can be removed; firing an event is a look-up.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        self._priorities: dict[tuple[str, int], int] = {}
        self._listeners: dict[str, tuple[Any, ...]] = {}
        self.heard = Heard()
        """For each event, under its value, whether anybody listens."""
        self.ending: str | None = None
        """Why the run is about to end; a batch that can't be fetched is no error then."""
        self.epoch_iteration = 0
        """The number of this epoch's batches that have been fetched so far."""
        super().__init__(process_function)

    # -- handlers -----------------------------------------------------------------------------------------------------

    def register_events(self, *event_names: Any, **kwargs: Any) -> None:
        """Adds events that can be fired, as Ignite does; nobody listens to them yet."""
        super().register_events(*event_names, **kwargs)
        for event in event_names:
            self._note(event)

    def add_event_handler(
        self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Adds a handler, as Ignite does; it runs among the users' handlers of the event, in order of addition."""
        self._check_event(event_name)
        check_takes_engine(handler, event_name, *args, **kwargs)
        handle = super().add_event_handler(event_name, handler, *args, **kwargs)
        self._sort(event_name)
        return handle

    def add_event_handler_at(self, priority: int, event_name: Any, handler: Callable[..., Any]) -> RemovableEventHandle:
        """Adds a handler at a place of its own among those that share the event.

        Args:
            priority: one of :class:`camshaft.events.Priority`, or any integer; users' handlers are at 0.
            event_name: an event, or several joined by ``|``.
            handler: called as any handler of Ignite.

        Returns:
            The handle that removes it.
        """
        self._check_event(event_name)
        check_takes_engine(handler, event_name)
        known = {id(entry) for event in split(event_name) for entry in self._event_handlers.get(event, ())}
        handle = super().add_event_handler(event_name, handler)
        for event in split(event_name):
            for entry in self._event_handlers[event]:
                if id(entry) not in known:
                    self._priorities[event.name, id(entry[0])] = priority
        self._sort(event_name)
        return handle

    def remove_event_handler(self, handler: Callable[..., Any], event_name: Any) -> None:
        """Removes a handler, as Ignite does."""
        super().remove_event_handler(handler, event_name)
        self._sort(event_name)

    def _check_event(self, event_name: Any) -> None:
        """Raises where nobody can listen to an event."""

    def _handler_wrapper(self, handler: Callable[..., Any], event_name: Any, event_filter: Any) -> Callable[..., Any]:
        return Filtered(self, event_name, handler)

    def _sort(self, event_name: Any) -> None:
        """Puts the handlers of an event in their places, and has them compiled anew at the next firing."""
        events: tuple[Any, ...] = (event_name,) if isinstance(event_name, str) else split(event_name)
        for event in events:
            name: str = getattr(event, "name", event)
            entries = self._event_handlers[event]
            alive = {id(entry[0]) for entry in entries}
            gone = [key for key in self._priorities if key[0] == name and key[1] not in alive]
            for key in gone:
                del self._priorities[key]
            entries.sort(key=lambda entry: self._priorities.get((name, id(entry[0])), Priority.USER))
            self._note(event)

    def clock(self, event: Any) -> int:
        """The value of the clock on which an event counts."""
        return self.state.get_event_attrib_value(event)

    # -- firing -------------------------------------------------------------------------------------------------------

    def _note(self, event: Any) -> None:
        """Notes whether anybody listens to an event, and has its handlers compiled anew when it fires."""
        self._listeners.pop(getattr(event, "_name_", event), None)
        setattr(self.heard, getattr(event, "_value_", event), bool(self._event_handlers.get(event)))

    def _compile(self, event_name: Any) -> tuple[Any, ...]:
        """An event's handlers as tuples of (function, arguments, keywords, every, filter)."""
        compiled: list[tuple[Any, ...]] = []
        for function, args, kwargs in self._event_handlers.get(event_name, ()):
            takes_engine = bool(args) and isinstance(args[0], weakref.ref)  # Ignite's mark for "wants the engine"
            first, rest = ((self,), args[1:]) if takes_engine else ((), args)
            if isinstance(function, Filtered):
                compiled.append((function.handler, first, rest, kwargs, function.every, function.test))
            else:
                compiled.append((function, first, rest, kwargs, 0, None))
        self._listeners[getattr(event_name, "_name_", event_name)] = listeners = tuple(compiled)
        return listeners

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        self.last_event_name = event_name
        listeners = self._listeners.get(event_name if type(event_name) is str else event_name._name_)
        if listeners is None:
            listeners = self._compile(event_name)
        if not listeners:
            return
        now = None
        for function, first, rest, kwargs, every, test in listeners:
            if test is not None:
                if now is None:
                    now = self.clock(event_name)
                if now % every if every else not test(self, now):
                    continue
            function(*first, *event_args, *rest, **kwargs, **event_kwargs)

    def _handle_exception(self, e: BaseException) -> None:
        """Runs every ``EXCEPTION_RAISED`` handler, then lets the exception go on."""
        if isinstance(e, GeneratorExit):  # an interrupted run that is thrown away
            raise e
        self.last_event_name = Events.EXCEPTION_RAISED
        add_note(e, f"camshaft: in epoch {self.state.epoch}, iteration {self.state.iteration}")
        for function, first, rest, kwargs, _, _ in self._compile(Events.EXCEPTION_RAISED):
            try:
                function(*first, e, *rest, **kwargs)
            except BaseException as second:
                if second is not e:
                    add_note(e, f"camshaft: a handler of EXCEPTION_RAISED failed too: {second!r}")
        raise e

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> State:
        """Runs over the data, as Ignite does; an exception leaves it, and it can be called again afterwards."""
        self._listeners.clear()
        try:
            return super().run(*args, **kwargs)
        except BaseException:
            generator = self._internal_run_generator
            if generator is not None and inspect.getgeneratorstate(generator) == inspect.GEN_CLOSED:
                self._internal_run_generator = None  # it has ended; Ignite would wait for it for ever
                self._init_iter = 0  # as after terminate(): the next epoch begins with its first batch
            raise

    def _internal_run_legacy(self) -> State:
        """Ignite's loop without interruption isn't ours: there is one loop, and ``interrupt()`` refuses by itself."""
        return self._internal_run()

    def _data_stopped(self) -> None:
        """Called when an epoch gets no more data, before the events that say so."""

    def _run_once_on_dataset_as_gen(self) -> Generator[State, None, float]:
        """One epoch: Ignite's own loop and order of events, without what it costs where nobody listens."""
        started = time.time()
        for event in list(self._event_handlers):  # Ignite's profilers put themselves there behind our back
            self._note(event)
        state, fire, heard, step = self.state, self._fire_event, self.heard, self._process_function
        position = 0 if self._init_iter is None else self._init_iter
        self._init_iter = None
        self.epoch_iteration = position
        has_data = state.dataloader is not None
        restarted = False
        try:
            while state.epoch_length is None or position < state.epoch_length:
                state.batch = None
                if heard.get_batch_started and has_data and not restarted:
                    fire(GET_BATCH_STARTED)
                    yield from self._maybe_terminate_or_interrupt()
                try:
                    state.batch = next(self._dataloader_iter)  # type: ignore[arg-type]
                except Exception as error:
                    if not isinstance(error, StopIteration):
                        self._on_fetch_error(error)
                    if state.epoch_length is None:
                        self._learn_epoch_length(position)
                        break
                    if restarted:
                        self._warn_of_missing_data()
                        break
                    if has_data:
                        fire(DATALOADER_STOP_ITERATION)
                        yield from self._maybe_terminate_or_interrupt()
                    self._setup_dataloader_iter()
                    restarted = True
                    continue
                state.output = None
                if heard.get_batch_completed and has_data:
                    fire(GET_BATCH_COMPLETED)
                    yield from self._maybe_terminate_or_interrupt()
                restarted = False
                self.epoch_iteration = position = position + 1
                state.iteration += 1
                if heard.iteration_started:
                    fire(ITERATION_STARTED)
                    if self.should_terminate or self.should_terminate_single_epoch or self.should_interrupt:
                        yield from self._maybe_terminate_or_interrupt()
                state.output = step(self, state.batch)
                if heard.iteration_completed:
                    fire(ITERATION_COMPLETED)
                if self.should_terminate or self.should_terminate_single_epoch or self.should_interrupt:
                    yield from self._maybe_terminate_or_interrupt()
                if position == state.epoch_length:
                    break
                if state.max_iters is not None and state.iteration >= state.max_iters:
                    self._data_stopped()
                    self.should_terminate = True
                    raise _EngineTerminateException
            self._data_stopped()
        except _EngineTerminateSingleEpochException:
            self._data_stopped()
            fire(Events.TERMINATE_SINGLE_EPOCH, iter_counter=position)
            self._setup_dataloader_iter()
        return time.time() - started

    def _on_fetch_error(self, error: Exception) -> None:
        """Ends a run that is about to end anyway, where whatever asks it to has ended the loader's workers too."""
        if self.ending is None:
            raise error
        self.logger.warning(f"The run ends before its next batch, which could not be fetched: {error}")
        stop(self, self.ending)
        raise _EngineTerminateException

    def _learn_epoch_length(self, length: int) -> None:
        state = self.state
        if state.max_iters is not None and not length:
            raise RuntimeError(
                "the data gave no batch, so that max_iters would never be reached; give a loader that isn't empty"
            )
        state.epoch_length = length
        if state.max_iters is not None:
            state.max_epochs = math.ceil(state.max_iters / length)

    def _warn_of_missing_data(self) -> None:
        state = self.state
        if self._is_done(state):
            return
        total = state.max_iters if state.max_epochs is None else (state.epoch_length or 0) * state.max_epochs
        warnings.warn(
            "Data iterator can not provide data anymore but required total number of iterations to run is not reached. "
            f"Current iteration: {state.iteration} vs Total iterations to run : {total}",
            stacklevel=2,
        )


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an exception, once. Python 3.10 keeps it but doesn't print it."""
    notes = getattr(error, "__notes__", [])
    if note not in notes:
        vars(error)["__notes__"] = [*notes, note]
