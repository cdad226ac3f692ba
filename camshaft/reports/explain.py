"""The text of ``trainer.explain()``: every event with its handlers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from ignite.engine import Events

from camshaft.events import FilteredHandler, StepEvents, filter_terms
from camshaft.handler import Handler
from camshaft.protocols import TrainerLike

__all__ = ["explain"]

CYCLE: tuple[tuple[Any, int], ...] = (
    (Events.STARTED, 0),
    (Events.EPOCH_STARTED, 1),
    (Events.GET_BATCH_STARTED, 2),
    (Events.GET_BATCH_COMPLETED, 2),
    (Events.ITERATION_STARTED, 2),
    *((event, 3) for event in StepEvents),
    (Events.ITERATION_COMPLETED, 2),
    (Events.DATALOADER_STOP_ITERATION, 2),
    (Events.TERMINATE_SINGLE_EPOCH, 1),
    (Events.EPOCH_COMPLETED, 1),
    (Events.TERMINATE, 0),
    (Events.COMPLETED, 0),
    (Events.INTERRUPT, 0),
    (Events.EXCEPTION_RAISED, 0),
)
"""Every event in the order in which it fires, those that may fire at any time last, with its depth of nesting."""

ALWAYS = {Events.STARTED, Events.EPOCH_STARTED, Events.ITERATION_STARTED, *StepEvents}
ALWAYS |= {Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED}
"""The events that are shown even without handlers."""


def explain(trainer: TrainerLike) -> str:
    """Describes the cycle as it will run; see :meth:`Trainer.explain`."""
    lines = list(_settings(trainer))
    for event, depth in CYCLE:
        handlers = [entry[0] for entry in trainer._event_handlers.get(event, ()) if not _is_internal(entry[0])]
        if not handlers and event not in ALWAYS:
            continue
        lines.append("  " * depth + event.name)
        lines += ["  " * depth + "    " + _describe(handler) for handler in handlers]
    of_the_cycle = {event for event, _ in CYCLE}
    for event, entries in trainer._event_handlers.items():  # a user's own events
        if event not in of_the_cycle and entries:
            lines.append(str(getattr(event, "name", event)))
            lines += ["    " + _describe(entry[0]) for entry in entries]
    return "\n".join(lines)


def _settings(trainer: TrainerLike) -> Iterator[str]:
    """One line for each phase: its network, optimizers, window and precision."""
    for phase in trainer.phases.values():
        optimizers = " + ".join(type(optimizer).__name__ for optimizer in phase.optimizers)
        window = phase.window
        text = f"{phase.name}: {type(phase.module).__name__} on {phase.device}, {optimizers}"
        if phase is not trainer.primary:
            text += f", after every {phase.interval} steps of {trainer.primary.name}"
        if window.steps > 1:
            text += f", {window.steps} batches a step (a shorter last window: {window.partial})"
        if window.loss_weight != "batch":
            weight = window.loss_weight
            text += f", weighted by {weight if isinstance(weight, str) else getattr(weight, '__name__', weight)}"
        if phase.precision.dtype is not None:
            text += f", {str(phase.precision.dtype).removeprefix('torch.')}"
        if phase.precision.scaler.is_enabled():
            text += ", scaled"
        yield ", ".join(filter(None, [text, phase.execution.describe()]))


def _is_internal(function: Any) -> bool:
    """Whether a handler is one of the trainer's own functions."""
    return inspect.isfunction(function) and function.__module__.startswith("camshaft.")


def _describe(entry: Any) -> str:
    function = entry.handler if isinstance(entry, FilteredHandler) else entry
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", type(function).__name__)
    text = f"{owner.describe()}.{name}" if isinstance(owner, Handler) else _qualified(function, owner, name)
    if isinstance(entry, FilteredHandler):
        found = filter_terms(entry.event).items()
        terms = [f"{key}={value!r}" if key != "event_filter" else _words(str(value)) for key, value in found]
        text += f"  ({', '.join(terms)})"
    if isinstance(owner, Handler) and owner.changes:
        text += f"  [changes {', '.join(owner.changes)}]"
    return text


def _words(name: str) -> str:
    """A filter's name; of one that is called ``when_...``, as the package's own are, the words."""
    words = name.strip("_").replace("_", " ")
    return words if words.startswith("when ") else name


def _qualified(function: Any, owner: Any, name: str) -> str:
    return name if owner is None or isinstance(owner, type) else f"{type(owner).__name__}.{name}"
