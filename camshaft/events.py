"""The moments of a training step, and the handlers that open at them."""

from __future__ import annotations

import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from ignite.engine import CallableEventWithFilter, Engine, EventEnum, Events, EventsList

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Events", "Handler", "Listener", "Place", "StepEvents", "on"]

F = TypeVar("F", bound=Callable[..., Any])


class StepEvents(EventEnum):
    """The moments inside one training step, in the order in which they fire.

    The step, with each event in its place::

        for batch in loader:                                # Ignite: ITERATION_STARTED, on the iteration clock
            if the window is new: optimizer.zero_grad()
            x, y = prepare_batch(batch)                     # on the device
            FORWARD_STARTED                                 # state.x, state.y
            with autocast:
                y_pred = model(x)
                loss = loss_fn(y_pred, y)
            FORWARD_COMPLETED                               # state.y_pred, state.loss: may be replaced
            BACKWARD_STARTED
            scaler.scale(loss / window).backward()
            BACKWARD_COMPLETED                              # this batch's share is in .grad

            if the window is closed:                        # on the optimizer-step clock
                scaler.unscale_(optimizer)
                GRADIENTS_READY                             # .grad is the true gradient; then guard, then clipping
                GRADIENTS_CLIPPED                           # state.grad_norm: the norm before clipping
                if the scaler or the guard refuses:
                    scaler.update()
                    OPTIMIZER_STEP_SKIPPED                  # on the clock of skipped steps
                else:
                    OPTIMIZER_STEP_STARTED                  # the last moment before the weights change
                    optimizer.step()
                    scaler.update()
                    OPTIMIZER_STEP_COMPLETED                # .grad still there; history, EMA, users, schedule
                                                            # Ignite: ITERATION_COMPLETED

    An *iteration* is one batch (``state.iteration``); a *window* is the iterations whose gradients make one *optimizer
    step* (``state.optimizer_step``). Both clocks start at 1. While a step's events fire, ``optimizer_step`` is the
    number of the step that is being made; otherwise it is the number of steps that have been completed.

    Every event takes Ignite's filters on its own clock, ``|``, and ``phase=`` to hear one network of several::

        from camshaft import Events, StepEvents

        StepEvents.GRADIENTS_CLIPPED(every=100)
        StepEvents.OPTIMIZER_STEP_COMPLETED(once=[1, 10, 100]) | Events.COMPLETED
        StepEvents.GRADIENTS_READY(phase="discriminator", every=10)
    """

    FORWARD_STARTED = "forward_started"
    """The batch is on the device, as ``state.x`` and ``state.y``."""
    FORWARD_COMPLETED = "forward_completed"
    """``state.y_pred`` and ``state.loss`` are there; a handler may replace ``state.loss``."""
    BACKWARD_STARTED = "backward_started"
    """The loss is final."""
    BACKWARD_COMPLETED = "backward_completed"
    """This batch's share is in ``.grad``; its scale is not promised before ``GRADIENTS_READY``."""
    GRADIENTS_READY = "gradients_ready"
    """The window is closed; ``.grad`` is the true gradient, unscaled and normalised but not clipped."""
    GRADIENTS_CLIPPED = "gradients_clipped"
    """Clipped or not; ``state.grad_norm`` is the total norm before clipping, or ``None`` where nobody measures."""
    OPTIMIZER_STEP_STARTED = "optimizer_step_started"
    """The last moment before the weights change."""
    OPTIMIZER_STEP_COMPLETED = "optimizer_step_completed"
    """The weights have changed, ``.grad`` is still there."""
    OPTIMIZER_STEP_SKIPPED = "optimizer_step_skipped"
    """Instead of the two above, where the scaler or a guard refused; its clock is ``state.skipped_steps``."""

    def __call__(
        self,
        event_filter: Callable[[Engine, int], bool] | None = None,
        every: int | None = None,
        once: int | list[int] | None = None,
        before: int | None = None,
        after: int | None = None,
        *,
        phase: str | None = None,
    ) -> CallableEventWithFilter:
        """Filters the event as Ignite's events do, and by the phase (the network) whose events fire.

        Args:
            event_filter: a function of (engine, clock) that says whether to run.
            every: run on each multiple of this number.
            once: run at this value, or these values, of the clock.
            before: run while the clock is below this value.
            after: run while the clock is above this value.
            phase: run for this phase only, counted on its own clock (for the first four events: its forward passes).

        Returns:
            The filtered event.

        Raises:
            ValueError: where the filters contradict each other or a number is out of range.

        Example:
            >>> StepEvents.GRADIENTS_READY(every=10).name
            'GRADIENTS_READY'
        """
        if phase is None:
            return super().__call__(event_filter, every, once, before, after)
        if not isinstance(phase, str):
            raise TypeError(f"phase must be the name of a phase, got {phase!r}")
        alone = all(term is None for term in (event_filter, every, once, before, after))
        inner = None if alone else super().__call__(event_filter, every, once, before, after).filter
        return PhaseEvent(self, phase, inner)


STEP_CLOCKS: Mapping[str, str] = {
    "FORWARD_STARTED": "iteration",
    "FORWARD_COMPLETED": "iteration",
    "BACKWARD_STARTED": "iteration",
    "BACKWARD_COMPLETED": "iteration",
    "GRADIENTS_READY": "optimizer_step",
    "GRADIENTS_CLIPPED": "optimizer_step",
    "OPTIMIZER_STEP_STARTED": "optimizer_step",
    "OPTIMIZER_STEP_COMPLETED": "optimizer_step",
    "OPTIMIZER_STEP_SKIPPED": "skipped_steps",
}
"""The field of ``engine.state`` on which each event counts."""

PHASE_CLOCKS: Mapping[str, str] = {
    name: "forward_passes" if clock == "iteration" else clock for name, clock in STEP_CLOCKS.items()
}
"""The field of a phase on which each event counts when it is filtered by phase."""


class PhaseEvent(CallableEventWithFilter):
    """A step event that is heard for one phase only, on that phase's own clock."""

    def __init__(self, event: CallableEventWithFilter, phase: str, inner: Callable[[Engine, int], bool] | None) -> None:
        clock = PHASE_CLOCKS[event.name]

        def heard(engine: Any, _: int) -> bool:
            if engine.state.phase != phase:
                return False
            return inner is None or bool(inner(engine, getattr(engine.phases[phase], clock)))

        super().__init__(event.value, heard, event.name)
        self.phase = phase
        self.inner = inner


class Place(IntEnum):
    """Where the package's own handlers stand among those that share an event; users' handlers are at ``USER``."""

    HISTORY = -60
    AVERAGE = -50
    EVALUATE = -40
    SCHEDULE_BY_METRIC = -30
    USER = 0
    GUARD = 10
    CLIP = 20
    SCHEDULE = 30
    JUDGE = 40
    LOG = 50
    AGREE = 55
    SAVE = 60


CHANGES = ("loss", "gradients", "weights")
"""What a handler may say that it changes."""

TOLD: Mapping[str, str] = {"EXCEPTION_RAISED": "error", "TERMINATE_SINGLE_EPOCH": "iter_counter"}
"""What Ignite tells the handlers of an event besides the engine."""


class Listener(NamedTuple):
    """One method of a handler at one event, and its place among those that share the event."""

    event: CallableEventWithFilter | EventsList
    function: Callable[..., Any]
    place: int


def split(event: Any) -> tuple[CallableEventWithFilter, ...]:
    """The single events of ``A | B``, as a tuple that a later ``|`` can't change.

    Raises:
        TypeError: where ``event`` is neither an event nor events joined by ``|``.
    """
    events = tuple(event) if isinstance(event, EventsList) else (event,)
    for item in events:
        if not isinstance(item, CallableEventWithFilter):
            raise TypeError(f"expected an event such as Events.EPOCH_COMPLETED or StepEvents.GRADIENTS_READY, got {item!r}")
    return events


def filter_terms(event: CallableEventWithFilter) -> dict[str, Any]:
    """The terms of an event's filter by name, e.g. ``{"every": 10}``; a callable's under ``"event_filter"``."""
    terms: dict[str, Any] = {}
    test = event.filter
    if isinstance(event, PhaseEvent):
        terms["phase"], test = event.phase, event.inner
    if test is None:
        return terms
    if getattr(test, "__qualname__", "").startswith("CallableEventWithFilter."):  # Ignite's own, terms in its closure
        found = inspect.getclosurevars(test).nonlocals
        found = {name.rstrip("_"): value for name, value in found.items()}
        unset = {"after": 0, "before": float("inf")}
        return terms | {name: value for name, value in found.items() if value != unset.get(name)}
    return terms | {"event_filter": getattr(test, "__name__", repr(test))}


def on(*events: Any, place: int = Place.USER) -> Callable[[F], F]:
    """Marks a handler's method with the events at which it runs.

    Args:
        events: one or more events, each with or without filters, or joined by ``|``.
        place: the place among the handlers that share the event; users' own are at ``Place.USER``.

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
        method._place = place  # type: ignore[attr-defined]
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
    granted: bool = False
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
                    yield Listener(event, getattr(self, attribute), marked._place)

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
        at(listener.place, listener.event, listener.function)


def stop(engine: Engine, reason: str) -> None:
    """Ends an engine's run; a trainer notes why in ``state.stop_reason``."""
    if hasattr(engine.state, "stop_reason"):
        engine.terminate(reason=reason)  # type: ignore[call-arg]
    else:
        engine.terminate()


def pack(value: Any, where: str) -> Any:
    """``value`` as tensors and plain values, so that ``torch.load(weights_only=True)`` can read it.

    Raises:
        TypeError: names the place of whatever can't be carried.
    """
    if value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, np.generic):
        return pack(value.item(), where)
    if type(value) in (list, tuple, set, torch.Size):
        kind = tuple if isinstance(value, torch.Size) else type(value)
        return kind(pack(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) in (dict, OrderedDict, Counter):
        return type(value)({pack(key, f"{where}'s keys"): pack(item, f"{where}[{key!r}]") for key, item in value.items()})
    if hasattr(value, "state_dict"):
        return pack(dict(value.state_dict()), where)
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint can't carry safely; "
        "use tensors, numbers, text, lists and dicts of them, or an object with state_dict()"
    )
