"""The events of a training step, their clocks and filters, and the priorities of handlers."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

from ignite.engine import CallableEventWithFilter, Engine, EventEnum, Events, EventsList

__all__ = [
    "Events",
    "FilteredHandler",
    "PhaseEvent",
    "Priority",
    "STEP_CLOCKS",
    "StepEvents",
    "check_takes_engine",
    "filter_terms",
    "split",
]


class StepEvents(EventEnum):
    """The events inside one training step, in the order in which they fire.

    The step, with each event in its place::

        for batch in loader:                                # Ignite: ITERATION_STARTED, on the iteration clock
            if a new window starts: optimizer.zero_grad()
            x, y = prepare_batch(batch)                     # on the device
            FORWARD_STARTED                                 # state.x, state.y
            with autocast:
                y_pred = model(x)
                loss = loss_fn(y_pred, y)
            FORWARD_COMPLETED                               # state.y_pred, state.loss (a handler may replace it)
            BACKWARD_STARTED
            scaler.scale(loss / window).backward()
            BACKWARD_COMPLETED                              # this batch's gradient is accumulated in .grad

            if the window is full:                          # on the optimizer-step clock
                scaler.unscale_(optimizer)
                GRADIENTS_READY                             # .grad is the true gradient; users, guard, clipping
                GRADIENTS_CLIPPED                           # state.grad_norm: the norm before clipping
                if the scaler or a handler skips the step:
                    scaler.update()
                    OPTIMIZER_STEP_SKIPPED                  # on the clock of skipped steps
                else:
                    OPTIMIZER_STEP_STARTED                  # the last event before the weights change
                    optimizer.step()
                    scaler.update()
                    OPTIMIZER_STEP_COMPLETED                # .grad is still set; history, EMA, users, schedule
                                                            # Ignite: ITERATION_COMPLETED

    An *iteration* is one batch (``state.iteration``); a *window* is the iterations whose gradients make one *optimizer
    step* (``state.optimizer_step``). Both clocks start at 1. From ``GRADIENTS_READY`` on, ``optimizer_step`` is the number of
    the current step; outside of a step it is the number of completed steps.

    Every event takes Ignite's filters on its own clock, ``|``, and ``phase=`` for one of several networks::

        from camshaft import Events, StepEvents

        StepEvents.GRADIENTS_CLIPPED(every=100)
        StepEvents.OPTIMIZER_STEP_COMPLETED(once=[1, 10, 100]) | Events.COMPLETED
        StepEvents.GRADIENTS_READY(phase="discriminator", every=10)
    """

    FORWARD_STARTED = "forward_started"
    """The batch is on the device, in ``state.x`` and ``state.y``."""
    FORWARD_COMPLETED = "forward_completed"
    """``state.y_pred`` and ``state.loss`` are set; a handler may replace ``state.loss``."""
    BACKWARD_STARTED = "backward_started"
    """The loss is final."""
    BACKWARD_COMPLETED = "backward_completed"
    """This batch's gradient is accumulated in ``.grad``; its scale is undefined before ``GRADIENTS_READY``."""
    GRADIENTS_READY = "gradients_ready"
    """The window is full; ``.grad`` is the true gradient, unscaled and normalized but not clipped."""
    GRADIENTS_CLIPPED = "gradients_clipped"
    """Fires for every window; ``state.grad_norm`` is the total norm before clipping, or ``None`` if no handler measures it."""
    OPTIMIZER_STEP_STARTED = "optimizer_step_started"
    """The last event before the weights change."""
    OPTIMIZER_STEP_COMPLETED = "optimizer_step_completed"
    """The weights have changed; ``.grad`` is still set."""
    OPTIMIZER_STEP_SKIPPED = "optimizer_step_skipped"
    """Replaces the two events above if the scaler or a handler skips the step; its clock is ``state.skipped_steps``."""

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
        """Filters the event as Ignite's events do, and by phase (network).

        Args:
            event_filter: a function of (engine, clock) that returns whether to run.
            every: run at each multiple of this number.
            once: run at this value (or these values) of the clock.
            before: run while the clock is below this value.
            after: run while the clock is above this value.
            phase: run for this phase only, on its own clock (for the first four events: its forward passes).

        Returns:
            The filtered event.

        Raises:
            ValueError: if the filters contradict each other or a number is out of range.

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
"""The field of ``engine.state`` that is the clock of each event."""

PHASE_CLOCKS: Mapping[str, str] = {
    name: "forward_passes" if clock == "iteration" else clock for name, clock in STEP_CLOCKS.items()
}
"""The field of a phase that is the clock of each event filtered by phase."""


class PhaseEvent(CallableEventWithFilter):
    """A step event filtered by phase, on that phase's own clock."""

    def __init__(self, event: CallableEventWithFilter, phase: str, inner: Callable[[Engine, int], bool] | None) -> None:
        clock = PHASE_CLOCKS[event.name]

        def is_selected(engine: Any, _: int) -> bool:
            if engine.state.phase != phase:
                return False
            return inner is None or bool(inner(engine, getattr(engine.phases[phase], clock)))

        super().__init__(event.value, is_selected, event.name)
        self.phase = phase
        self.inner = inner


class Priority(IntEnum):
    """The order of handlers that share an event, lowest first; users' handlers have ``USER``."""

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
    SYNC = 55
    SAVE = 60


def split(event: Any) -> tuple[CallableEventWithFilter, ...]:
    """Splits ``A | B`` into its events.

    Raises:
        TypeError: if ``event`` is neither an event nor events joined by ``|``.
    """
    events = tuple(event) if isinstance(event, EventsList) else (event,)
    for item in events:
        if not isinstance(item, CallableEventWithFilter):
            raise TypeError(f"expected an event such as Events.EPOCH_COMPLETED or StepEvents.GRADIENTS_READY, got {item!r}")
    return events


def filter_terms(event: CallableEventWithFilter) -> dict[str, Any]:
    """The arguments of an event's filter by name, e.g. ``{"every": 10}``; a callable is under ``"event_filter"``."""
    terms: dict[str, Any] = {}
    test = event.filter
    if isinstance(event, PhaseEvent):
        terms["phase"], test = event.phase, event.inner
    if test is None:
        return terms
    if getattr(test, "__qualname__", "").startswith("CallableEventWithFilter."):  # Ignite's own filter: read its closure
        found = inspect.getclosurevars(test).nonlocals
        found = {name.rstrip("_"): value for name, value in found.items()}
        unset = {"after": 0, "before": float("inf")}
        return terms | {name: value for name, value in found.items() if value != unset.get(name)}
    return terms | {"event_filter": getattr(test, "__name__", repr(test))}


EXTRA_ARGUMENTS: Mapping[str, str] = {"EXCEPTION_RAISED": "error", "TERMINATE_SINGLE_EPOCH": "iter_counter"}
"""The argument that Ignite passes to the handlers of an event after the engine."""


def check_takes_engine(function: Callable[..., Any], event: Any, *args: Any, **kwargs: Any) -> None:
    """Raises ``ValueError`` if an event cannot call a function, neither with the engine nor without arguments.

    Args:
        function: the handler.
        event: the event, or events joined by ``|``.
        args: further arguments that the user has registered.
        kwargs: further keyword arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Ignite raises its own error for what is not callable
        return
    for single in event if isinstance(event, EventsList) else (event,):
        name_of_event = str(getattr(single, "name", single))
        extra = EXTRA_ARGUMENTS.get(name_of_event)
        rest = (*([] if extra is None else [extra]), *args)
        if not (can_bind(signature, "engine", *rest, **kwargs) or can_bind(signature, *rest, **kwargs)):
            takes = ", ".join(["engine", *map(str, rest), *(f"{name}={value}" for name, value in kwargs.items())])
            name = getattr(function, "__qualname__", type(function).__name__)
            raise ValueError(
                f"{name} can't be called at {name_of_event}: a handler takes ({takes}), this one takes "
                f"{signature}" + ("; the batch is engine.state.batch" if "batch" in signature.parameters else "")
            )


def can_bind(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


class FilteredHandler:
    """A handler behind an event filter. It keeps the handler alive, so that a bound method can be removed again."""

    def __init__(self, engine: Any, event: CallableEventWithFilter, handler: Callable[..., Any]) -> None:
        self._engine, self.handler, self.event = weakref.ref(engine), handler, event  # the engine holds this object
        self.__wrapped__ = handler
        terms = filter_terms(event)
        self.every = terms["every"] if set(terms) == {"every"} else 0
        self.test: Callable[[Any, int], bool] = event.filter or (lambda engine, clock: True)

    def _parent(self) -> Callable[..., Any]:
        """The handler itself: what Ignite asks for when it compares and removes handlers."""
        return self.handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine: Any = self._engine()
        if self.test(engine, engine.clock(self.event)):
            return self.handler(*args, **kwargs)
        return None
