"""Saves and restores Ignite's metrics that are attached to a trainer, so that a resumed epoch has them complete."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine
from ignite.metrics import Metric

from camshaft.serialization import pack

__all__ = ["metric_states", "restore_metrics"]


def attached_metrics(engine: Engine) -> dict[str, Metric]:
    """The metrics attached to an engine; each key is a number, in order of attachment, and the metric's class."""
    found: dict[int, Metric] = {}
    for entries in engine._event_handlers.values():
        for function, _, _ in entries:
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            if isinstance(owner, Metric):
                found.setdefault(id(owner), owner)
    return {f"{number} {type(metric).__name__}": metric for number, metric in enumerate(found.values())}


def metric_states(engine: Engine) -> dict[str, Any]:
    """The accumulated state of each attached metric; ``None`` for one that does not save its state."""
    states: dict[str, Any] = {}
    for name, metric in attached_metrics(engine).items():
        try:
            states[name] = pack(dict(metric.state_dict()), name) if metric._state_dict_all_req_keys else None
        except (TypeError, ValueError):
            states[name] = None
    return states


def restore_metrics(engine: Engine, states: Mapping[str, Any], in_mid_epoch: bool) -> None:
    """Restores the accumulated state of each attached metric; warns of those that do not save one."""
    partial = []
    for name, metric in attached_metrics(engine).items():
        if states.get(name) is None:
            partial.append(name.split()[1])
        else:
            metric.load_state_dict(states[name])
    if partial and in_mid_epoch:
        warnings.warn(
            f"resume: the metrics {', '.join(partial)} do not save their state; in epoch "
            f"{engine.state.epoch + 1} they cover only the iterations since the resume",
            stacklevel=2,
        )
