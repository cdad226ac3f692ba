"""A progress bar that does not wait for the device in every iteration."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from camshaft.distributed.collectives import is_main_process
from camshaft.events import Events, Priority
from camshaft.handler import Handler, on
from camshaft.readback import Readback

__all__ = ["Progress"]


class Progress(Handler):
    """Shows a tqdm progress bar for each epoch, with the loss and the iterations per second.

    It never waits for the device: a redraw shows the loss that has arrived since the last one, and only the final bar of an
    epoch waits for its own. With several processes rank 0 draws the bar, with its own loss.

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
        self._shown: dict[str, str] = {}
        self._reading: tuple[list[str], Readback] | None = None

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
            self._take_if_ready()
            if self._reading is None:
                self._read(numbers_in(engine.state.output))
                self._take_if_ready()
            self._draw()

    @on(Events.EPOCH_COMPLETED | Events.TERMINATE | Events.COMPLETED | Events.EXCEPTION_RAISED, priority=Priority.LOG)
    def close(self, engine: Any, *_: Any) -> None:
        """Draws the final state of the epoch, with the metrics, and closes the bar."""
        if self.bar is not None:
            state = engine.state
            self._read(numbers_in(state.output) | (numbers_in(state.metrics) if self.metrics else {}))
            self._take()
            self._draw()
            self.bar.close()
            self.bar = None
            self._shown = {}

    def on_detach(self, engine: Any) -> None:
        """Closes the bar."""
        self.close(engine)

    def _read(self, numbers: dict[str, Any]) -> None:
        """Starts to copy numbers to the host."""
        self._reading = list(numbers), Readback(list(numbers.values()))

    def _take_if_ready(self) -> None:
        if self._reading is not None and self._reading[1].is_ready():
            self._take()

    def _take(self) -> None:
        """Shows the numbers that have been copied; waits for them."""
        assert self._reading is not None
        names, numbers = self._reading
        self._reading = None
        self._shown = {name: f"{number:.4g}" for name, number in zip(names, numbers.floats(), strict=True)}

    def _draw(self) -> None:
        self.bar.set_postfix(self._shown, refresh=False)
        self.bar.update(self._count - self.bar.n)


def numbers_in(values: Any) -> dict[str, Any]:
    """The numbers in an output or in metrics, by name."""
    named = values if isinstance(values, Mapping) else {"loss": values}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    }
