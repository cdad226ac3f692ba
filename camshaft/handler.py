"""Handlers: classes whose marked methods run on events of an engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from ignite.engine import CallableEventWithFilter, Engine, EventsList, RemovableEventHandle

from camshaft.events import Priority, check_takes_engine, split
from camshaft.serialization import pack

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Handler", "Listener", "handlers_of", "on", "stop"]

F = TypeVar("F", bound=Callable[..., Any])


CHANGES = ("loss", "gradients", "weights")
"""What a handler may declare that it changes."""


class Listener(NamedTuple):
    """One method of a handler, its event, and its priority among the handlers of that event."""

    event: CallableEventWithFilter | EventsList
    function: Callable[..., Any]
    priority: int


def on(*events: Any, priority: int = Priority.USER) -> Callable[[F], F]:
    """Marks a handler's method with the events on which it runs.

    Args:
        events: one or more events, each with or without filters, or joined by ``|``.
        priority: the order among the handlers of the event, lowest first; users' handlers have ``Priority.USER``.

    Returns:
        The decorator. A subclass that overrides the method keeps its events, unless it marks the method again.

    Raises:
        TypeError: if an argument is not an event.

    Example:
        >>> from camshaft import Events
        >>> class Report(Handler):
        ...     @on(Events.EPOCH_COMPLETED(every=5) | Events.COMPLETED)
        ...     def report(self, engine):
        ...         print(engine.state.epoch)
    """
    if not events:
        raise TypeError("on() needs at least one event, for example @on(Events.EPOCH_COMPLETED)")
    marks = tuple(single for event in events for single in split(event))

    def mark(method: F) -> F:
        method._marks = marks  # type: ignore[attr-defined]
        method._priority = priority  # type: ignore[attr-defined]
        return method

    return mark


class Handler:
    """A class whose methods run on events of an engine, and whose state is saved in every checkpoint.

    Subclasses mark methods with :func:`on`. They name in ``saved`` the attributes that belong in a checkpoint (tensors, plain
    values, containers of them, or objects with ``state_dict``), and in ``changes`` what they modify: any of ``"loss"``,
    ``"gradients"``, ``"weights"``, which ``trainer.explain()`` shows.

    Example:
        >>> from camshaft import StepEvents
        >>> class StepCounter(Handler):
        ...     saved = ("steps",)
        ...
        ...     def __init__(self):
        ...         self.steps = 0
        ...
        ...     @on(StepEvents.OPTIMIZER_STEP_COMPLETED)
        ...     def count(self, engine):
        ...         self.steps += 1
    """

    saved: ClassVar[tuple[str, ...]] = ()
    changes: ClassVar[tuple[str, ...]] = ()
    needs_trainer: ClassVar[bool] = False
    """Whether it needs a trainer with phases; if not, any Ignite engine that fires its events will do."""
    differs_by_rank: ClassVar[bool] = False
    """Whether its state differs between processes, so that a checkpoint holds the state of each rank."""

    provides: str | None = None
    """The prefix of the metrics that this handler writes to ``state.metrics``; ``None`` if it writes none."""
    has_run: bool = False
    """Whether a handler that provides metrics has written them in this run."""
    agreed: bool = False
    """With several processes: whether any rank's :meth:`requests_checkpoint` was true when the ranks last compared."""

    name: str = ""
    """The name under which its state is saved."""
    _engine: weakref.ref[Engine] | None = None
    _engine_before_run: Engine | None = None
    _handles: Sequence[RemovableEventHandle] = ()

    @property
    def engine(self) -> Any:
        """The engine to which this handler is attached, or ``None``.

        An engine holds its handlers, and the reference back is weak, so that an engine that goes out of scope is freed at once.
        Only before the first run it is strong: ``CheckpointRotation(folder).attach(create_trainer(...))`` can be resumed.
        """
        return None if self._engine is None else self._engine()

    def release_engine(self) -> None:
        """Called after each run: from now on the handler does not keep its engine alive."""
        self._engine_before_run = None

    def attach(self, engine: Engine, name: str | None = None) -> Self:
        """Registers every marked method on its events of ``engine``.

        Args:
            engine: a camshaft trainer, or any Ignite engine that fires the handler's events.
            name: the name under which the state is saved; by default the class's name.

        Returns:
            The handler itself.

        Raises:
            RuntimeError: if the handler is attached already.
            TypeError: if ``engine`` is not an Ignite engine, or ``saved`` or ``changes`` is not a tuple of names.
            ValueError: if the engine does not fire one of the events, no method is marked with an event, a method cannot be
                called by its event, ``changes`` names something else, or the name is taken.
        """
        name = self._check_attachable(engine, name)
        listeners = [item._replace(event=single) for item in self.listeners() for single in split(item.event)]
        check_class(self, listeners)
        check_listeners(self, engine, listeners)
        self._engine, self.name = weakref.ref(engine), name
        self._engine_before_run = None if getattr(engine, "has_run", True) else engine
        handlers_of(engine)[name] = self
        try:
            self.on_attach(engine)
            # A handle refers to its function weakly, which does not work for bound methods: detach() finds those again.
            handles = [(item.function, add_listener(engine, item)) for item in listeners]
            self._handles = [handle for function, handle in handles if getattr(function, "__self__", None) is not self]
            pending = getattr(engine, "unclaimed", {})
            if name in pending:
                self.load_state_dict(pending.pop(name))
        except BaseException:
            self.detach()
            raise
        return self

    def _check_attachable(self, engine: Engine, name: str | None) -> str:
        """Checks that the handler can be attached to ``engine``, and returns the name it will have there."""
        if self.engine is not None:
            raise RuntimeError(f"{type(self).__name__} is attached already; call detach() first")
        if not isinstance(engine, Engine):
            raise TypeError(f"{type(self).__name__}.attach() needs an Ignite engine, got {type(engine).__name__}")
        if self.needs_trainer and not hasattr(engine, "phases"):
            raise TypeError(f"{type(self).__name__} needs a trainer from create_trainer(), got {type(engine).__name__}")
        name = name or self.default_name()
        if name in handlers_of(engine):
            raise ValueError(
                f"a handler named {name!r} is attached already; "
                f"give this {type(self).__name__} another name: attach(engine, name='{name}2')"
            )
        return name

    def detach(self) -> None:
        """Removes every method from the engine; does nothing if the handler is not attached."""
        engine, self._engine, self._engine_before_run = self.engine, None, None
        if engine is None:
            return
        for item in self.listeners():
            for event in split(item.event):
                if engine.has_event_handler(item.function, event):
                    engine.remove_event_handler(item.function, event)
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        handlers_of(engine).pop(self.name, None)
        self.on_detach(engine)
        self.name = ""

    @contextmanager
    def attached(self, engine: Engine, name: str | None = None) -> Iterator[Self]:
        """Attaches the handler inside a ``with`` block."""
        self.attach(engine, name)
        try:
            yield self
        finally:
            self.detach()

    def listeners(self) -> Iterator[Listener]:
        """Yields every (event, bound method, priority); a subclass may add those that depend on its arguments."""
        for attribute in dict.fromkeys(name for cls in type(self).__mro__ for name in vars(cls)):
            marked = next((m for m in _definitions(type(self), attribute) if hasattr(m, "_marks")), None)
            if marked is not None:
                for event in marked._marks:
                    yield Listener(event, getattr(self, attribute), marked._priority)

    def on_attach(self, engine: Any) -> None:
        """Called before the methods are registered, for checks and settings that need the engine."""

    def on_detach(self, engine: Any) -> None:
        """Called after the methods have been removed."""

    @property
    def longest_save(self) -> float:
        """The duration of the longest checkpoint that this handler has written, in seconds."""
        return 0.0

    def requests_checkpoint(self, engine: Any) -> bool:
        """Whether this rank needs something that all ranks must do together at the end of this iteration."""
        return False

    def default_name(self) -> str:
        """The name under which the state is saved if ``attach`` is given none."""
        return type(self).__name__

    def describe(self) -> str:
        """A short description for ``trainer.explain()``: the class, after its name if that is another."""
        kind = type(self).__name__
        name = self.name or kind
        return name if name.startswith(kind) else f"{name}: {kind}"

    def state_dict(self) -> dict[str, Any]:
        """The attributes named in ``saved``, as tensors and plain values.

        Raises:
            AttributeError: if one of them is not set.
            TypeError: if an attribute holds something that a checkpoint cannot carry.
        """
        return {attribute: pack(self._saved(attribute), f"{type(self).__name__}.{attribute}") for attribute in self.saved}

    def _saved(self, attribute: str) -> Any:
        try:
            return getattr(self, attribute)
        except AttributeError as error:
            raise AttributeError(
                f"{type(self).__name__}.saved names {attribute!r}, which is not set ({error}); set it in __init__, or at "
                "Events.STARTED at the latest"
            ) from error

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the attributes named in ``saved``; those that are missing from ``state`` keep their values."""
        for attribute in self.saved:
            if attribute in state:
                current = getattr(self, attribute, None)
                if current is not None and hasattr(current, "load_state_dict"):
                    current.load_state_dict(state[attribute])
                else:
                    setattr(self, attribute, state[attribute])


def check_class(handler: Handler, listeners: list[Listener]) -> None:
    """Checks a handler's class for mistakes that would make it do nothing or lose its state.

    Args:
        handler: the handler.
        listeners: its listeners.

    Raises:
        TypeError: if ``saved`` or ``changes`` is not a tuple of names.
        ValueError: if ``changes`` names something else, or no method is marked with an event.
    """
    kind = type(handler)
    for attribute in ("saved", "changes"):
        names = getattr(handler, attribute)
        if isinstance(names, str):
            raise TypeError(f"{kind.__name__}.{attribute} must be a tuple of names; write ({names!r},), with a comma")
        if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{kind.__name__}.{attribute} must be a tuple of names, got {names!r}")
    unknown = [name for name in handler.changes if name not in CHANGES]
    if unknown:
        raise ValueError(f"{kind.__name__}.changes may name {', '.join(map(repr, CHANGES))}, got {unknown[0]!r}")
    hooks = [name for name in dir(kind) if name.startswith("on_") and not hasattr(Handler, name)]
    carries_state = bool(handler.saved) or kind.state_dict is not Handler.state_dict
    acts_otherwise = any(getattr(kind, name) is not getattr(Handler, name) for name in ("listeners", "on_attach", "on_detach"))
    if not listeners and not acts_otherwise and (hooks or not carries_state):
        raise ValueError(
            f"{kind.__name__} runs on no event; mark a method with its event, such as @on(Events.EPOCH_COMPLETED)"
            + (f". Nothing calls {hooks[0]}(); to use a Keras callback, attach KerasStyle(callback)" if hooks else "")
        )


def check_listeners(handler: Handler, engine: Engine, listeners: list[Listener]) -> None:
    """Raises ``ValueError`` if ``engine`` does not fire one of the events, or an event cannot call its method."""
    for item in listeners:
        for event in split(item.event):
            if not engine.has_registered_events(event):
                raise ValueError(
                    f"{type(handler).__name__} runs on {event.name}, which this {type(engine).__name__} "
                    "does not fire; attach it to an engine made by create_trainer()"
                )
        check_takes_engine(item.function, item.event)


def _definitions(cls: type, attribute: str) -> Iterator[Any]:
    """What each class defines under this name, in method resolution order."""
    return (vars(base)[attribute] for base in cls.__mro__ if attribute in vars(base))


def handlers_of(engine: Engine) -> dict[str, Handler]:
    """The camshaft handlers attached to an engine, by name."""
    table: dict[str, Handler] = engine.__dict__.setdefault("handlers", {})
    return table


def add_listener(engine: Engine, listener: Listener) -> RemovableEventHandle:
    """Registers one method on an engine, with its priority if the engine supports priorities."""
    add_at: Any = getattr(engine, "add_event_handler_at", None)
    if add_at is None:
        return engine.add_event_handler(listener.event, listener.function)
    handle: RemovableEventHandle = add_at(listener.priority, listener.event, listener.function)
    return handle


def stop(engine: Engine, reason: str) -> None:
    """Ends an engine's run; a trainer records the reason in ``state.stop_reason``."""
    if hasattr(engine.state, "stop_reason"):
        engine.terminate(reason=reason)  # type: ignore[call-arg]
    else:
        engine.terminate()
