"""Early stopping on a metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from camshaft.events import Events, Priority
from camshaft.handler import Handler, Listener, on, stop
from camshaft.metrics import MetricWatch, as_number, better, check_mode
from camshaft.validation import check_count, check_non_negative

__all__ = ["EarlyStopping"]


class EarlyStopping(Handler):
    """Ends the run when a metric has not improved in ``patience`` evaluations in a row.

    Every new value of the metric counts as one evaluation. A value that is not finite is not an improvement. The best score and
    the count are saved in every checkpoint.

    Args:
        metric: the name of the score in ``state.metrics``, such as ``"val/accuracy"``.
        mode: ``"max"`` if more is better, ``"min"`` if less is better.
        patience: the number of evaluations in a row without improvement that ends the run.
        min_delta: the amount by which a score must exceed the best one to be an improvement.

    Raises:
        ValueError: if ``mode``, ``patience`` or ``min_delta`` is not allowed; during the run, if the metric never appears.

    Example:
        >>> stopping = EarlyStopping("val/loss", mode="min", patience=3)
        >>> stopping.best is None
        True
    """

    saved = ("best", "stale")

    def __init__(self, metric: str, *, mode: str = "max", patience: int = 5, min_delta: float = 0.0) -> None:
        check_mode(mode, metric)
        self.watch = MetricWatch(metric, "EarlyStopping")
        self.mode, self.patience = mode, check_count(patience, "patience")
        self.min_delta = check_non_negative(min_delta, "min_delta")
        self.best: float | None = None
        """The best score so far."""
        self.stale = 0
        """The number of evaluations in a row without improvement."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the best score and the count.

        Raises:
            TypeError: if one of them is not a number.
            ValueError: if the count is not an integer of at least 0.
        """
        best, stale = state.get("best", self.best), state.get("stale", self.stale)
        self.best = None if best is None else as_number(best, "EarlyStopping.best")
        self.stale = check_count(stale, "EarlyStopping.stale", minimum=0)

    @on(Events.STARTED)
    def start(self, engine: Any) -> None:
        """Resets the count in a new run; a resumed run continues it."""
        self.watch.start(engine)
        if engine.state.iteration == 0:
            self.best, self.stale = None, 0
        elif self.stale >= self.patience:  # resumed from the end of a stopped run
            self._stop(engine)

    def on_attach(self, engine: Any) -> None:
        """Makes the engine count its metrics."""
        self.watch.attach(engine)

    def listeners(self) -> Iterator[Listener]:
        """Yields the events at which a new score may exist."""
        yield from super().listeners()
        yield Listener(Events.ITERATION_COMPLETED(self._when_new) | Events.EPOCH_COMPLETED, self.judge, Priority.JUDGE)
        yield Listener(Events.COMPLETED, self.check_at_end, Priority.SAVE + 2)

    def _when_new(self, engine: Any, _: int) -> bool:
        return self.watch.is_new(engine)

    def judge(self, engine: Any) -> None:
        """Compares a new score with the best one, and ends the run if patience has run out."""
        if not self.watch.is_new(engine):
            self.watch.check_exists(engine)
            return
        score = self.watch.take(engine)
        if better(score, self.best, self.mode, self.min_delta):
            self.best, self.stale = score, 0
            return
        self.stale += 1
        if self.stale >= self.patience:
            self._stop(engine)

    def check_at_end(self, engine: Any) -> None:
        """Raises ``ValueError`` if the metric has never appeared."""
        self.watch.check_at_end(engine)

    def _stop(self, engine: Any) -> None:
        best = "none was finite" if self.best is None else f"the best is {self.best:.6g}"
        reason = f"early stopping: {self.watch.metric} hasn't improved in {self.stale} evaluations ({best})"
        stop(engine, reason)
