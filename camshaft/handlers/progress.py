"""A progress bar that does not wait for the device in every iteration."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from camshaft.distributed.collectives import is_main_process
from camshaft.events import Events, Priority
from camshaft.handler import Handler, on

__all__ = ["Progress"]


class Progress(Handler):
    """Shows a tqdm progress bar for each epoch, with the loss and the iterations per second.

    It reads the loss from the device only when it redraws. With several processes rank 0 draws the bar, with its own loss.

    Args:
        every_seconds: the minimum time between two redraws.
        metrics: whether the final bar of an epoch shows ``state.metrics``.
        tqdm_options: passed to ``tqdm``, such as ``file`` or ``disable``.

    Raises:
        ModuleNotFoundError: if tqdm is not installed.

    Example:
        >>> progress = Progress(every_seconds=0.5, disable=True)
    """

    def __init__(self, *, every_seconds: float = 0.1, metrics: bool = True, **tqdm_options: Any) -> None:
        try:
            from tqdm.auto import tqdm
        except ModuleNotFoundError:
            raise ModuleNotFoundError("the progress bar needs tqdm: pip install tqdm") from None
        if not every_seconds >= 0:
            raise ValueError(f"every_seconds must be a number of at least 0, got {every_seconds!r}")
        self._tqdm, self.every_seconds, self.metrics = tqdm, every_seconds, metrics
        self.options = {"mininterval": 0.0, "leave": True, "dynamic_ncols": True} | tqdm_options
        if not is_main_process():
            self.options["disable"] = True
        self.bar: Any = None
        self._next = 0.0

    @on(Events.EPOCH_STARTED, priority=Priority.LOG)
    def open(self, engine: Any, done: int = 0) -> None:
        """Starts the bar of the epoch."""
        if self.bar is None:
            state = engine.state
            of = "" if state.max_epochs is None else f"/{state.max_epochs}"
            description = f"epoch {state.epoch}{of}"
            self.bar = self._tqdm(total=state.epoch_length, initial=done, desc=description, **self.options)
            self._count = done

    @on(Events.ITERATION_COMPLETED, priority=Priority.LOG)
    def advance(self, engine: Any) -> None:
        """Counts, and redraws if it is time."""
        if self.engine is None:  # detached in this iteration
            return
        if self.bar is None:  # attached or resumed in the middle of an epoch
            self.open(engine, getattr(engine, "epoch_iteration", 1) - 1)
        self._count += 1
        if self.bar.disable:
            return
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.every_seconds
            self._draw(engine.state)

    @on(Events.EPOCH_COMPLETED | Events.TERMINATE | Events.COMPLETED | Events.EXCEPTION_RAISED, priority=Priority.LOG)
    def close(self, engine: Any, *_: Any) -> None:
        """Draws the final state of the epoch, with the metrics, and closes the bar."""
        if self.bar is not None:
            self._draw(engine.state, with_metrics=self.metrics)
            self.bar.close()
            self.bar = None

    def on_detach(self, engine: Any) -> None:
        """Closes the bar."""
        self.close(engine)

    def _draw(self, state: Any, with_metrics: bool = False) -> None:
        shown = shown_values(state.output)
        if with_metrics:
            shown |= shown_values(state.metrics)
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(self._count - self.bar.n)


def shown_values(values: Any) -> dict[str, str]:
    """Formats the numbers in an output or in metrics."""
    named = values if isinstance(values, Mapping) else {"loss": values}
    numbers = {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    }
    return {name: f"{number:.4g}" for name, number in numbers.items()}
