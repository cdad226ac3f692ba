"""Firing an event is one call, which does nothing if the event has no handlers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine

__all__ = ["Fire", "FireEvent", "no_handlers"]


class Fire:
    """A callable for each event of an engine, under the event's value: ``engine.fire.gradients_ready()``."""

    if TYPE_CHECKING:  # attributes are set as events are registered; a real __getattr__ would be called at each lookup

        def __getattr__(self, event: str) -> Callable[..., None]: ...


def no_handlers(*args: Any, **kwargs: Any) -> None:
    """Fires an event that has no handlers."""


class FireEvent:
    """Fires one event that has handlers."""

    __slots__ = ("_engine", "_event")

    def __init__(self, engine: Engine, event: Any) -> None:
        self._engine, self._event = weakref.ref(engine), event  # the engine holds this object

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        engine = self._engine()
        assert engine is not None
        engine._fire_event(self._event, *args, **kwargs)
