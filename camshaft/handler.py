"""Handlers: classes whose marked methods run on events of an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from ignite.engine import CallableEventWithFilter, Engine, EventsList

from camshaft.events import Priority, split
from camshaft.serialization import pack

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Handler", "Listener", "check_takes_engine", "on", "stop"]

F = TypeVar("F", bound=Callable[..., Any])


CHANGES = ("loss", "gradients", "weights")
"""What a handler may say that it changes."""


TOLD: Mapping[str, str] = {"EXCEPTION_RAISED": "error", "TERMINATE_SINGLE_EPOCH": "iter_counter"}
"""What Ignite tells the handlers of an event besides the engine."""


class Listener(NamedTuple):
    """One method of a handler at one event, and its place among those that share the event."""

    event: CallableEventWithFilter | EventsList
    function: Callable[..., Any]
    priority: int


def on(*events: Any, priority: int = Priority.USER) -> Callable[[F], F]:
    """Marks a handler's method with the events at which it runs.

    Args:
        events: one or more events, each with or without filters, or joined by ``|``.
        place: the place among the handlers that share the event; users' own are at ``Priority.USER``.

    Returns:
        The decorator. A subclass that overrides the method keeps its events, unless it marks it anew.

    Raises:
        TypeError: where something else than an event is given.

    Example:
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
    """A class whose methods open at events of an engine, and whose state travels in every checkpoint.

    Subclasses mark methods with :func:`on`, name in ``saved`` the attributes that belong to a checkpoint (tensors, plain
    values, containers of them, or objects with ``state_dict``), and in ``changes`` what they touch: any of ``"loss"``,
    ``"gradients"``, ``"weights"``, shown by ``trainer.explain()``.

    Example:
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
    """Whether it needs the phases of a trainer, and not only its events."""
    differs_by_rank: ClassVar[bool] = False
    """Whether its state is another one on each of several processes, so that a checkpoint holds each one's."""
    agreed: bool = False
    """Where several processes train: whether any of them has wished for what this handler's ``wish(engine)`` asks."""

    engine: Any = None
    """The engine to which this handler is attached; ``None`` where it is attached to none."""
    name: str = ""
    """The name under which its state is saved."""

    _attached: list[Listener]

    def attach(self, engine: Engine, name: str | None = None) -> Self:
        """Opens every marked method at its events of ``engine``.

        Args:
            engine: a camshaft trainer, or any Ignite engine that fires the events in use.
            name: the name under which the state is saved; by default the class's name.

        Returns:
            The handler itself.

        Raises:
            RuntimeError: where it is attached already.
            TypeError: where ``engine`` is none, or ``saved`` or ``changes`` isn't a tuple of names.
            ValueError: where the engine doesn't fire one of the events, the handler opens at none, a method can't be called,
                ``changes`` names something else, or the name is taken.
        """
        if self.engine is not None:
            raise RuntimeError(f"{type(self).__name__} is attached already; call detach() first")
        if not isinstance(engine, Engine):
            raise TypeError(f"{type(self).__name__}.attach() needs an Ignite engine, got {type(engine).__name__}")
        if self.needs_trainer and not hasattr(engine, "phases"):
            raise TypeError(f"{type(self).__name__} needs a trainer from create_trainer(), got {type(engine).__name__}")
        name = name or self.default_name()
        registry = handlers_of(engine)
        if name in registry:
            raise ValueError(
                f"a handler named {name!r} is attached already; "
                f"give this {type(self).__name__} another: attach(engine, name='{name}2')"
            )
        listeners = [item._replace(event=single) for item in self.listeners() for single in split(item.event)]
        check_class(self, listeners)
        for event in (single for item in listeners for single in split(item.event)):
            if not engine.has_registered_events(event):
                raise ValueError(
                    f"{type(self).__name__} opens at {event.name}, which this {type(engine).__name__} "
                    "doesn't fire; attach it to an engine made by create_trainer()"
                )
        for item in listeners:
            check_takes_engine(item.function, item.event)
        self.engine, self.name, self._attached = engine, name, []
        registry[name] = self
        try:
            self.on_attach(engine)
            for item in listeners:
                add(engine, item)
                self._attached.append(item)
            unclaimed = getattr(engine, "unclaimed", {})
            if name in unclaimed:
                self.load_state_dict(unclaimed.pop(name))
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Takes every method off the engine again; does nothing where the handler isn't attached."""
        if self.engine is None:
            return
        engine, listeners = self.engine, self._attached
        for item in listeners:
            if engine.has_event_handler(item.function, item.event):
                engine.remove_event_handler(item.function, item.event)
        handlers_of(engine).pop(self.name, None)
        self._attached = []
        self.on_detach(engine)
        self.engine, self.name = None, ""

    @contextmanager
    def attached(self, engine: Engine, name: str | None = None) -> Iterator[Self]:
        """Attaches for the length of a ``with`` block."""
        self.attach(engine, name)
        try:
            yield self
        finally:
            self.detach()

    def listeners(self) -> Iterator[Listener]:
        """Every (event, bound method, place) of this handler; a subclass may add those that depend on its arguments."""
        for attribute in dict.fromkeys(name for cls in type(self).__mro__ for name in vars(cls)):
            marked = next((m for m in _definitions(type(self), attribute) if hasattr(m, "_marks")), None)
            if marked is not None:
                for event in marked._marks:
                    yield Listener(event, getattr(self, attribute), marked._priority)

    def on_attach(self, engine: Any) -> None:
        """Called before the methods are attached: checks and settings that need the engine."""

    def on_detach(self, engine: Any) -> None:
        """Called after the methods have been taken off."""

    def default_name(self) -> str:
        """The name under which the state is saved where ``attach`` is given none."""
        return type(self).__name__

    def describe(self) -> str:
        """A few words for ``trainer.explain()``: the class, behind another name that it was given."""
        kind = type(self).__name__
        name = self.name or kind
        return name if name.startswith(kind) else f"{name}: {kind}"

    def state_dict(self) -> dict[str, Any]:
        """The attributes named in ``saved``, as tensors and plain values.

        Raises:
            AttributeError: where one of them isn't set.
            TypeError: where an attribute holds something that a checkpoint can't carry.
        """
        return {attribute: pack(self._saved(attribute), f"{type(self).__name__}.{attribute}") for attribute in self.saved}

    def _saved(self, attribute: str) -> Any:
        try:
            return getattr(self, attribute)
        except AttributeError as error:
            raise AttributeError(
                f"{type(self).__name__}.saved names {attribute!r}, which isn't set ({error}); set it in __init__, or at "
                "Events.STARTED at the latest"
            ) from error

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the attributes named in ``saved``; what the checkpoint doesn't know stays as it is."""
        for attribute in self.saved:
            if attribute in state:
                current = getattr(self, attribute, None)
                if current is not None and hasattr(current, "load_state_dict"):
                    current.load_state_dict(state[attribute])
                else:
                    setattr(self, attribute, state[attribute])


def check_class(handler: Handler, listeners: list[Listener]) -> None:
    """Raises where a handler's class can't be meant as it is: it would do nothing, or its state would be lost.

    Args:
        handler: the handler.
        listeners: all of its own.
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
            f"{kind.__name__} opens at no event; mark a method with its event, such as @on(Events.EPOCH_COMPLETED)"
            + (f". Nobody calls {hooks[0]}(); a callback made for Keras is attached by KerasStyle(callback)" if hooks else "")
        )


def check_takes_engine(function: Callable[..., Any], event: Any, *args: Any, **kwargs: Any) -> None:
    """Raises ``ValueError`` where a function can't be called by an event: with the engine, or with nothing.

    Args:
        function: the handler.
        event: the event, or events joined by ``|``.
        args: what the user wants to be handed on, too.
        kwargs: the same by name.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Ignite has its own words for what can't be called at all
        return
    for single in event if isinstance(event, EventsList) else (event,):
        moment = str(getattr(single, "name", single))
        told = TOLD.get(moment)
        rest = (*([] if told is None else [told]), *args)
        if not (_binds(signature, "engine", *rest, **kwargs) or _binds(signature, *rest, **kwargs)):
            takes = ", ".join(["engine", *map(str, rest), *(f"{name}={value}" for name, value in kwargs.items())])
            name = getattr(function, "__qualname__", type(function).__name__)
            raise ValueError(
                f"{name} can't be called at {moment}: a handler takes ({takes}), this one takes "
                f"{signature}" + ("; the batch is engine.state.batch" if "batch" in signature.parameters else "")
            )


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _definitions(cls: type, attribute: str) -> Iterator[Any]:
    """What each class in the order of inheritance defines under this name."""
    return (vars(base)[attribute] for base in cls.__mro__ if attribute in vars(base))


def handlers_of(engine: Engine) -> dict[str, Handler]:
    """The handlers of this package on an engine, by name: a trainer's own table, or one kept on any Ignite engine."""
    table: dict[str, Handler] = engine.__dict__.setdefault("handlers", {})
    return table


def add(engine: Engine, listener: Listener) -> None:
    """Adds one method to an engine; one that knows places puts it in the right one."""
    at = getattr(engine, "add_event_handler_at", None)
    if at is None:
        engine.add_event_handler(listener.event, listener.function)
    else:
        at(listener.priority, listener.event, listener.function)


def stop(engine: Engine, reason: str) -> None:
    """Ends an engine's run; a trainer notes why in ``state.stop_reason``."""
    if hasattr(engine.state, "stop_reason"):
        engine.terminate(reason=reason)  # type: ignore[call-arg]
    else:
        engine.terminate()
