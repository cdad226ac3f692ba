"""Ignite's engine with a fast loop, priorities of handlers, and exceptions that always leave ``run()``."""

from __future__ import annotations

import inspect
import math
import time
import warnings
import weakref
from collections.abc import Callable, Generator
from typing import Any

from ignite.engine import Engine, Events, RemovableEventHandle, State
from ignite.engine.engine import _EngineTerminateException, _EngineTerminateSingleEpochException

from camshaft.engines.data_length import check_not_longer, check_not_shorter, pass_length
from camshaft.engines.fire import Fire, FireEvent, no_handlers
from camshaft.events import FilteredHandler, Priority, check_takes_engine, split
from camshaft.handler import handlers_of, stop
from camshaft.validation import add_note

__all__ = ["LoopEngine", "no_handlers"]


class LoopEngine(Engine):
    """An Ignite engine in which events without handlers cost next to nothing.

    It differs from :class:`ignite.engine.Engine` in four ways. An exception always leaves :meth:`run`, after every
    ``EXCEPTION_RAISED`` handler has run and with the iteration in a note, and the engine can be run again. Handlers have
    priorities. A filtered bound method can be removed. Firing an event is one lookup.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        self._priorities: dict[tuple[str, int], int] = {}
        self._compiled: dict[str, tuple[Any, ...]] = {}
        self.fire = Fire()
        self.ending: str | None = None
        """Why the run is about to end; if set, a batch that can't be fetched is not an error."""
        self.fetched = 0
        """The number of batches that the current pass over the data has returned."""
        self.has_run = False
        """Whether a run has ended, by an exception too."""
        self.epoch_iteration = 0
        """The number of batches of this epoch that have been fetched."""
        super().__init__(process_function)

    # -- handlers -----------------------------------------------------------------------------------------------------

    def register_events(self, *event_names: Any, **kwargs: Any) -> None:
        """Registers events that can be fired, as Ignite does."""
        super().register_events(*event_names, **kwargs)
        for event in event_names:
            self._refresh(event)

    def add_event_handler(
        self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Adds a handler, as Ignite does. It has the priority of users' handlers, which run in the order of addition."""
        self._check_event(event_name)
        check_takes_engine(handler, event_name, *args, **kwargs)
        handle = super().add_event_handler(event_name, handler, *args, **kwargs)
        self._sort(event_name)
        return handle

    def add_event_handler_at(self, priority: int, event_name: Any, handler: Callable[..., Any]) -> RemovableEventHandle:
        """Adds a handler with a priority.

        Args:
            priority: one of :class:`camshaft.Priority`, or any integer; lower runs first, users' handlers have 0.
            event_name: an event, or several joined by ``|``.
            handler: called like any handler of Ignite.

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
        """Raises if no handler can run on an event."""

    def _handler_wrapper(self, handler: Callable[..., Any], event_name: Any, event_filter: Any) -> Callable[..., Any]:
        return FilteredHandler(self, event_name, handler)

    def _sort(self, event_name: Any) -> None:
        """Sorts the handlers of an event by priority."""
        events: tuple[Any, ...] = (event_name,) if isinstance(event_name, str) else split(event_name)
        for event in events:
            name: str = getattr(event, "name", event)
            entries = self._event_handlers[event]
            current = {id(entry[0]) for entry in entries}
            removed = [key for key in self._priorities if key[0] == name and key[1] not in current]
            for key in removed:
                del self._priorities[key]
            entries.sort(key=lambda entry: self._priorities.get((name, id(entry[0])), Priority.USER))
            self._refresh(event)

    def clock(self, event: Any) -> int:
        """The value of an event's clock."""
        return self.state.get_event_attrib_value(event)

    # -- firing -------------------------------------------------------------------------------------------------------

    def _refresh(self, event: Any) -> None:
        """Recompiles the handlers of an event at its next firing, and updates ``fire``."""
        self._compiled.pop(getattr(event, "_name_", event), None)
        has_handlers = bool(self._event_handlers.get(event))
        setattr(self.fire, getattr(event, "_value_", event), FireEvent(self, event) if has_handlers else no_handlers)

    def _mute(self, event: Any) -> None:
        """Makes firing an event do nothing, until :meth:`_unmute` or a change of its handlers."""
        self._compiled[event.name] = ()

    def _unmute(self, event: Any) -> None:
        """Ends :meth:`_mute`."""
        self._compiled.pop(event.name, None)

    def _compile(self, event_name: Any) -> tuple[Any, ...]:
        """An event's handlers as tuples (Ignite's entry, function, takes engine, arguments, keywords, every, filter)."""
        compiled: list[tuple[Any, ...]] = []
        for entry in self._event_handlers.get(event_name, ()):
            function, args, kwargs = entry
            takes_engine = bool(args) and isinstance(args[0], weakref.ref)  # Ignite's mark for "wants the engine"
            further = args[1:] if takes_engine else args
            if isinstance(function, FilteredHandler):
                compiled.append((entry, function.handler, takes_engine, further, kwargs, function.every, function.test))
            else:
                compiled.append((entry, function, takes_engine, further, kwargs, 0, None))
        self._compiled[getattr(event_name, "_name_", event_name)] = handlers = tuple(compiled)
        return handlers

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        self.last_event_name = event_name
        name = event_name if type(event_name) is str else event_name._name_
        handlers = self._compiled.get(name)
        if handlers is None:
            handlers = self._compile(event_name)
        self._run_handlers(handlers, event_name, event_args, event_kwargs)
        if self._compiled.get(name) is not handlers:
            self._run_added_handlers(handlers, event_name, event_args, event_kwargs)

    def _run_handlers(self, handlers: Any, event_name: Any, event_args: Any, event_kwargs: Any) -> None:
        clock = None
        for _, function, takes_engine, args, kwargs, every, test in handlers:
            if test is not None:
                if clock is None:
                    clock = self.clock(event_name)
                if clock % every if every else not test(self, clock):
                    continue
            if takes_engine:
                function(self, *event_args, *args, **kwargs, **event_kwargs)
            else:
                function(*event_args, *args, **kwargs, **event_kwargs)

    def _run_added_handlers(self, known: Any, event_name: Any, event_args: Any, event_kwargs: Any) -> None:
        """Runs the handlers that have been added to an event while it fired, as Ignite does."""
        while True:
            latest = self._compile(event_name) if event_name in self._event_handlers else ()
            seen = {id(handler[0]) for handler in known}
            added = tuple(handler for handler in latest if id(handler[0]) not in seen)
            if not added:
                return
            known += added
            self._run_handlers(added, event_name, event_args, event_kwargs)

    def _handle_exception(self, e: BaseException) -> None:
        """Runs every ``EXCEPTION_RAISED`` handler, then raises the exception again."""
        if isinstance(e, GeneratorExit):  # an interrupted run that is discarded
            raise e
        self.last_event_name = Events.EXCEPTION_RAISED
        add_note(e, f"camshaft: in epoch {self.state.epoch}, iteration {self.state.iteration}")
        for _, function, takes_engine, args, kwargs, _, _ in self._compile(Events.EXCEPTION_RAISED):
            try:
                function(*([self] if takes_engine else []), e, *args, **kwargs)
            except BaseException as second:
                if second is not e:
                    add_note(e, f"camshaft: a handler of EXCEPTION_RAISED failed too: {second!r}")
        try:
            raise e
        finally:
            del e  # its traceback holds this frame

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> State:
        """Runs over the data, as Ignite does; an exception leaves it, and it can be called again afterwards."""
        self._compiled.clear()
        try:
            return super().run(*args, **kwargs)
        except BaseException:
            generator = self._internal_run_generator
            if generator is not None and inspect.getgeneratorstate(generator) == inspect.GEN_CLOSED:
                self._internal_run_generator = None  # Ignite would try to continue it
                self._init_iter = 0  # as after terminate(): the next epoch starts with its first batch
            raise
        finally:
            self.has_run = True
            self.release_by_handlers()

    def release_by_handlers(self) -> None:
        """Makes the references of the attached handlers to this engine weak."""
        for handler in handlers_of(self).values():
            handler.release_engine()

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """Ends the epoch after the current event, as Ignite does."""
        super().terminate_epoch(skip_epoch_completed is True)  # as a handler it is given the engine

    def _internal_run_legacy(self) -> State:
        """Runs the one loop there is: Ignite's loop without interruption is not used."""
        return self._internal_run()

    def _on_data_end(self) -> None:
        """Called when an epoch gets no more data, before the events of its end."""

    def _run_once_on_dataset_as_gen(self) -> Generator[State, None, float]:
        """Runs one epoch: Ignite's loop and order of events, without the cost of events that have no handlers."""
        started = time.time()
        for event in list(self._event_handlers):  # Ignite's profilers change this table directly
            self._refresh(event)
        state, fire, step = self.state, self.fire, self._process_function
        position = 0 if self._init_iter is None else self._init_iter
        self._init_iter = None
        self.epoch_iteration = position
        has_data = state.dataloader is not None
        longest_pass = pass_length(state)
        restarted = False
        try:
            while state.epoch_length is None or position < state.epoch_length:
                state.batch = None
                if has_data and not restarted:
                    fire.get_batch_started()
                    if self.has_request:
                        yield from self._maybe_terminate_or_interrupt()
                try:
                    state.batch = next(self._dataloader_iter)  # type: ignore[arg-type]
                except Exception as error:
                    if not (yield from self._restart_data(error, position, restarted)):
                        break
                    restarted = True
                    continue
                state.output = None
                self.fetched += 1
                if self.fetched > longest_pass:
                    check_not_longer(state, self.fetched)
                if has_data:
                    fire.get_batch_completed()
                    if self.has_request:
                        yield from self._maybe_terminate_or_interrupt()
                restarted = False
                self.epoch_iteration = position = position + 1
                state.iteration += 1
                fire.iteration_started()
                if self.has_request:
                    yield from self._maybe_terminate_or_interrupt()
                state.output = step(self, state.batch)
                fire.iteration_completed()
                if self.has_request:
                    yield from self._maybe_terminate_or_interrupt()
                if position == state.epoch_length:
                    break
                if state.max_iters is not None and state.iteration >= state.max_iters:
                    self._on_data_end()
                    self.should_terminate = True
                    raise _EngineTerminateException
            self._on_data_end()
        except _EngineTerminateSingleEpochException:
            self._on_data_end()
            fire.terminate_single_epoch(iter_counter=position)
            self._setup_dataloader_iter()
        return time.time() - started

    def _restart_data(self, error: Exception, position: int, restarted: bool) -> Generator[State, None, bool]:
        """Starts another pass over the data if the epoch needs more batches; returns whether it does."""
        if not isinstance(error, StopIteration):
            self._on_fetch_error(error)
        if self.state.epoch_length is None:
            self._learn_epoch_length(position)
            return False
        if restarted:
            self._warn_of_missing_data()
            return False
        check_not_shorter(self.state, self.fetched)
        if self.state.dataloader is not None:
            self.fire.dataloader_stop_iteration()
            yield from self._maybe_terminate_or_interrupt()
        self._setup_dataloader_iter()
        return True

    def _setup_dataloader_iter(self) -> None:
        super()._setup_dataloader_iter()
        self.fetched = 0

    @property
    def has_request(self) -> bool:
        """Whether somebody has asked for the end of the run or the epoch, or for an interruption."""
        return bool(self.should_terminate or self.should_terminate_single_epoch or self.should_interrupt)

    def _on_fetch_error(self, error: Exception) -> None:
        """Raises a loader's error, unless the run is about to end anyway and its workers have been ended too."""
        if self.ending is None:
            raise error
        self.logger.warning(f"The run ends before its next batch, which could not be fetched: {error}")
        stop(self, self.ending)
        raise _EngineTerminateException

    def _learn_epoch_length(self, length: int) -> None:
        state = self.state
        if state.max_iters is not None and not length:
            raise RuntimeError("the data gave no batch, so max_iters would never be reached; give a loader that is not empty")
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
