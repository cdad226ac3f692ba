"""``state.metrics``: counts how often each metric is written, so that each result is used once."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from camshaft.validation import check_choice

__all__ = ["MetricWatch", "Metrics", "as_number", "better", "check_mode"]

logger = logging.getLogger("camshaft")


class Metrics(dict[str, Any]):
    """``engine.state.metrics``: a dict that counts how often each entry has been written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.writes: Counter[str] = Counter()
        self.version = 0
        self.update(*args, **kwargs)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.writes[key] += 1
        self.version += 1

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Writes each entry, and counts it."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, values: Any) -> Metrics:  # type: ignore[override,misc]
        self.update(values)
        return self

    def replaced(self, values: Mapping[str, Any]) -> Metrics:
        """New metrics in place of these, whose counts continue."""
        fresh = Metrics()
        fresh.writes, fresh.version = self.writes, self.version
        fresh.update(values)
        return fresh

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Writes and counts an entry that does not exist yet."""
        if key not in self:
            self[key] = default
        return self[key]

    def recall(self, values: Mapping[str, Any]) -> None:
        """Restores entries (from a checkpoint) without counting them as new."""
        super().update(values)


def as_number(value: Any, what: str) -> float:
    """A metric's value as a float.

    Raises:
        TypeError: if it is not a single number.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("float() would read it")
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a single number, got {type(value).__name__}: {value!r}") from None


LESS_IS_BETTER = re.compile(r"(?:^|[/_.-])(?:loss|error|err|mse|rmse|mae|nll|perplexity|ppl|fid)$", re.IGNORECASE)
"""The endings of the names of scores for which less is better."""


def check_mode(mode: str, metric: str | None) -> None:
    """Validates a ``mode`` argument, and warns if it does not fit the metric's name.

    Raises:
        ValueError: if it is neither ``"min"`` nor ``"max"``.
    """
    check_choice(mode, "mode", ("min", "max"))
    if mode == "max" and isinstance(metric, str) and LESS_IS_BETTER.search(metric):
        logger.warning("mode is 'max', so that the highest %r counts as the best; if less is better, use mode='min'", metric)


def better(score: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether ``score`` improves on ``best`` by more than ``min_delta``; a non-finite score never does."""
    if not math.isfinite(score):
        return False
    if best is None:
        return True
    return score > best + min_delta if mode == "max" else score < best - min_delta


class MetricWatch:
    """Waits for new values of one entry of ``engine.state.metrics``.

    Args:
        metric: the name of the entry, such as ``"val/accuracy"``.
        owner: the name of the handler that waits, for error messages.

    Raises:
        TypeError: if ``metric`` is not a name.
    """

    def __init__(self, metric: str, owner: str) -> None:
        if not isinstance(metric, str) or not metric:
            raise TypeError(f"metric must be a name such as 'val/accuracy', got {metric!r}")
        self.metric, self.owner, self.seen = metric, owner, 0

    def attach(self, engine: Any) -> None:
        """Makes an Ignite engine count its metrics."""
        if not isinstance(engine.state.metrics, Metrics):
            engine.state.metrics = Metrics(engine.state.metrics)

    def is_new(self, engine: Any) -> bool:
        """Whether the entry has been written since :meth:`take`."""
        return bool(engine.state.metrics.writes[self.metric] != self.seen)

    def take(self, engine: Any) -> float:
        """The value of the entry as a number; it is not new any more."""
        metrics = engine.state.metrics
        self.seen = metrics.writes[self.metric]
        return as_number(metrics[self.metric], f"{self.owner}: the metric {self.metric!r}")

    def start(self, engine: Any) -> None:
        """Ignores values from an earlier run."""
        self.seen = engine.state.metrics.writes[self.metric]

    def check_exists(self, engine: Any) -> None:
        """Raises ``ValueError`` if the entry has not been written, and no evaluation is still to come.

        Raises:
            ValueError: names the existing entries.
        """
        metrics = engine.state.metrics
        if self.metric in metrics:
            return
        writers = [h for h in engine.handlers.values() if h.provides is not None and self.metric.startswith(h.provides)]
        if any(not writer.has_run for writer in writers):
            return  # an evaluation that does not run in every epoch may still write it
        known = ", ".join(map(repr, metrics)) or "none"
        raise ValueError(
            f"{self.owner}: no metric named {self.metric!r} by the end of epoch {engine.state.epoch}; "
            f"engine.state.metrics has {known}. Attach an Evaluation that computes it, or correct the name; if your own "
            "handler writes it later, set it to NaN before the first epoch ends"
        )

    def check_at_end(self, engine: Any) -> None:
        """Raises ``ValueError`` if a run that was not stopped has ended without the entry.

        Raises:
            ValueError: names the existing entries.
        """
        if self.metric not in engine.state.metrics and getattr(engine.state, "stop_reason", None) is None:
            known = ", ".join(map(repr, engine.state.metrics)) or "none"
            raise ValueError(
                f"{self.owner}: no metric named {self.metric!r} in this run; engine.state.metrics has {known}. "
                "Correct the name, or attach an Evaluation that computes it before the run ends"
            )
