"""Early stopping on a metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from camshaft.events import Events, Priority
from camshaft.handler import Handler, Listener, on, stop
from camshaft.metrics import MetricWatch, better, check_mode

__all__ = ["EarlyStopping"]


class EarlyStopping(Handler):
    """Ends the run at the ``patience``-th evaluation in a row that brings no improvement.

    Best score and patience are saved in every checkpoint. A score that isn't finite is no improvement and never the best.

    Args:
        metric: the name of the score in ``state.metrics``, such as ``"val/accuracy"``.
        mode: ``"max"`` where more is better, ``"min"`` where less is.
        patience: how many evaluations in a row without improvement end the run.
        min_delta: by how much a score must beat the best to count.

    Raises:
        ValueError: if ``mode``, ``patience`` or ``min_delta`` isn't allowed; in the run if the metric never appears.

    Example:
        >>> stopping = EarlyStopping("val/loss", mode="min", patience=3)
        >>> stopping.best is None
        True
    """

    saved = ("best", "stale")

    def __init__(self, metric: str, *, mode: str = "max", patience: int = 5, min_delta: float = 0.0) -> None:
        check_mode(mode, metric)
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be a positive integer, got {patience!r}")
        if not isinstance(min_delta, (int, float)) or not 0 <= min_delta < float("inf"):
            raise ValueError(f"min_delta must be a finite number of at least 0, got {min_delta!r}")
        self.watch = MetricWatch(metric, "EarlyStopping")
        self.mode, self.patience, self.min_delta = mode, patience, min_delta
        self.best: float | None = None
        """The best score so far."""
        self.stale = 0
        """How many evaluations in a row have brought no improvement."""

    @on(Events.STARTED)
    def start(self, engine: Any) -> None:
        """A new run begins with full patience; a resumed one continues."""
        self.watch.start(engine)
        if engine.state.iteration == 0:
            self.best, self.stale = None, 0
        elif self.stale >= self.patience:  # resumed if it had ended
            self._stop(engine)

    def on_attach(self, engine: Any) -> None:
        """Has the engine count its metrics."""
        self.watch.attach(engine)

    def listeners(self) -> Iterator[Listener]:
        """The end of each epoch, and of an iteration in which the score was evaluated."""
        yield from super().listeners()
        yield Listener(Events.ITERATION_COMPLETED(self._when_new) | Events.EPOCH_COMPLETED, self.judge, Priority.JUDGE)
        yield Listener(Events.COMPLETED, self.check_at_end, Priority.SAVE + 2)

    def _when_new(self, engine: Any, _: int) -> bool:
        return self.watch.is_new(engine)

    def judge(self, engine: Any) -> None:
        """Judges a new score, and ends the run where patience is spent."""
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
        """A metric that a run has ended without is a mistake."""
        self.watch.check_at_end(engine)

    def _stop(self, engine: Any) -> None:
        best = "none was finite" if self.best is None else f"the best is {self.best:.6g}"
        reason = f"early stopping: {self.watch.metric} hasn't improved in {self.stale} evaluations ({best})"
        stop(engine, reason)
