"""Attaches callbacks that were written for Keras or Poutyne."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, Listener, on, stop
from camshaft.keras_callbacks import METHODS, Logs, ModelView, base_library, is_number, losses_of, means, methods_of
from camshaft.pytree import num_samples
from camshaft.serialization import pack

__all__ = ["KerasStyle"]

FIRST = {"keras": 0, "poutyne": 1}
"""The number of the first epoch, and of the first batch of an epoch."""


class KerasStyle(Handler):
    """Runs a callback that was written for Keras or Poutyne, or any object with some of their methods.

    What is called, and when:

    - ``on_train_begin(logs)`` on ``STARTED``, also in a resumed run; ``on_train_end(logs)`` on ``COMPLETED``.
    - ``on_epoch_begin(epoch, logs)`` on ``EPOCH_STARTED``; not again if a run resumes in the middle of an epoch.
    - ``on_epoch_end(epoch, logs)`` on ``EPOCH_COMPLETED``, after evaluation and before the checkpoint.
    - ``on_train_batch_begin(batch, logs)`` and ``on_train_batch_end(batch, logs)`` around each iteration; if they are missing,
      ``on_batch_begin`` and ``on_batch_end``.
    - ``on_backward_end(batch)`` on ``GRADIENTS_READY``: once per window, with the true gradient, before clipping.

    Methods for validation, test and prediction are never called: an evaluator is a separate engine.

    The logs of a batch hold ``loss`` and the other losses that ``compute_loss`` returns by name. They are fetched from the
    device only when the callback reads them. The logs of an epoch and of the end of the run hold the means of these losses
    over the samples of the epoch, and the metrics written during it (``val/accuracy`` as ``val_accuracy``). All other logs
    are empty. With several processes each has its own callback; the means are over all processes, and a callback that stops
    the run stops it on every rank.

    ``set_params`` receives ``epochs``, ``steps`` (batches per epoch) and ``verbose``. ``set_model`` receives an object with
    ``network``, ``optimizer``, ``device`` and ``metrics_names`` that otherwise behaves like the network; setting its
    ``stop_training = True`` ends the run. The state of a callback with ``state_dict`` and ``load_state_dict`` is saved in
    every checkpoint. A resumed run loads it after ``on_train_begin``.

    Args:
        callback: the object.
        style: ``"keras"`` counts epochs and batches from 0. ``"poutyne"`` counts from 1, adds ``epoch`` and ``time`` to the
            logs of an epoch, and ``batch``, ``size`` and ``time`` to those of a batch. By default it is the library of the
            callback's base class, and ``"keras"`` for any other.
        metrics_names: the columns that Poutyne's loggers write, without ``val_``.

    Raises:
        TypeError: if the callback has none of the methods.
        ValueError: if ``style`` is unknown.

    Example:
        >>> from camshaft import create_trainer
        >>> class Printer:
        ...     def on_epoch_end(self, epoch, logs):
        ...         print(epoch, logs)
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), torch.nn.functional.mse_loss)
        >>> _ = KerasStyle(Printer()).attach(trainer)
        >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.ones_(model.bias)
        >>> _ = trainer.run([(torch.zeros(2, 8), torch.zeros(2, 1))] * 2, max_epochs=2)
        0 {'loss': 1.0}
        1 {'loss': 1.0}
    """

    saved = ("totals", "samples")
    needs_trainer = True
    differs_by_rank = True

    def __init__(self, callback: Any, *, style: str | None = None, metrics_names: Sequence[str] = ()) -> None:
        if isinstance(callback, type):
            name = callback.__name__
            raise TypeError(f"callback must be an object, got the class {name}; make one: KerasStyle({name}(...))")
        self.methods = methods_of(callback)
        if not self.methods:
            raise TypeError(
                f"callback must have at least one of the methods {', '.join(METHODS)}; got {type(callback).__name__} with none"
            )
        if style is not None and style not in FIRST:
            raise ValueError(f"style must be 'keras', 'poutyne' or None, got {style!r}")
        self.callback, self.metrics_names = callback, list(metrics_names)
        self.style = style or base_library(callback)
        if "on_backward_end" in self.methods:
            self.changes = ("gradients",)  # type: ignore[misc]
        self.totals: dict[str, Any] = {}
        """The sum of each loss over the samples of this epoch, on the device."""
        self.samples = 0
        """The number of samples in this epoch."""
        self._logs: dict[str, Any] = {}
        self._loaded: Mapping[str, Any] | None = None
        self._epoch_began = self._batch_ended = 0.0
        self._writes: Mapping[str, int] = {}

    def default_name(self) -> str:
        """The name of this class and that of the callback's class."""
        return f"KerasStyle/{type(self.callback).__name__}"

    def listeners(self) -> Iterator[Listener]:
        """Yields the events of the methods that the callback implements."""
        yield from super().listeners()
        has = self.methods
        if "on_train_batch_begin" in has:
            yield Listener(Events.ITERATION_STARTED, self.begin_batch, Priority.USER)
        if "on_backward_end" in has:
            yield Listener(StepEvents.GRADIENTS_READY, self.end_backward, Priority.USER)
        if "on_epoch_end" in has or "on_train_end" in has:
            yield Listener(Events.ITERATION_COMPLETED, self.sum_losses, Priority.JUDGE)
            yield Listener(Events.EPOCH_COMPLETED, self.end_epoch, Priority.JUDGE)
        if "on_train_batch_end" in has:
            yield Listener(Events.ITERATION_COMPLETED, self.end_batch, Priority.JUDGE)
        if "on_train_end" in has:
            yield Listener(Events.COMPLETED, self.end_run, Priority.JUDGE)

    def on_attach(self, engine: Any) -> None:
        """Makes the model that the callback will see."""
        self.model = ModelView(list(engine.phases.values())[-1], self.metrics_names)

    @on(Events.STARTED)
    def begin_run(self, engine: Any) -> None:
        """Passes the model and calls ``on_train_begin``; in a resumed run it loads the callback's state after that."""
        state = engine.state
        self.model.stop_training = False
        self._epoch_began = self._batch_ended = time.perf_counter()
        self._writes, self._logs = dict(state.metrics.writes), {}
        if callable(getattr(self.callback, "set_params", None)):
            self.callback.set_params({"epochs": state.max_epochs, "steps": state.epoch_length, "verbose": 0})
        if callable(getattr(self.callback, "set_model", None)):
            self.callback.set_model(self.model)
        self._call("on_train_begin", {})
        if self._loaded is not None:
            self.callback.load_state_dict(self._loaded)
            self._loaded = None

    @on(Events.EPOCH_STARTED)
    def begin_epoch(self, engine: Any) -> None:
        """Resets the sums of the epoch, and calls ``on_epoch_begin``."""
        self.totals, self.samples = {}, 0
        self._epoch_began = self._batch_ended = time.perf_counter()
        self._writes = dict(engine.state.metrics.writes)
        self._call("on_epoch_begin", self._epoch(engine), {})

    def begin_batch(self, engine: Any) -> None:
        """Calls ``on_train_batch_begin``."""
        self._call("on_train_batch_begin", self._batch(engine), {})

    def end_backward(self, engine: Any) -> None:
        """Calls ``on_backward_end`` when the gradient of a window is ready."""
        self._call("on_backward_end", self._batch(engine))

    def sum_losses(self, engine: Any) -> None:
        """Adds the losses of the batch to the sums of the epoch, on the device."""
        size = num_samples(engine.state.batch) or 1
        self.samples += size
        for name, value in losses_of(engine).items():
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                value = value.float()  # a sum in half precision would lose accuracy or overflow
            self.totals[name] = value * size + self.totals.get(name, 0.0)

    def end_batch(self, engine: Any) -> None:
        """Calls ``on_train_batch_end`` with losses that stay on the device until they are read."""
        logs: dict[str, Any] = {}
        if self.style == "poutyne":
            now = time.perf_counter()
            size = num_samples(engine.state.batch)
            logs = {"batch": self._batch(engine), "size": size, "time": now - self._batch_ended}
            self._batch_ended = now
        self._call("on_train_batch_end", self._batch(engine), Logs(logs | losses_of(engine)))

    def end_epoch(self, engine: Any) -> None:
        """Calls ``on_epoch_end`` with the means and the new metrics."""
        logs: dict[str, Any] = {}
        if self.style == "poutyne":
            logs = {"epoch": self._epoch(engine), "time": time.perf_counter() - self._epoch_began}
        logs |= means(self.totals, self.samples)
        metrics = engine.state.metrics
        new = {name: value for name, value in metrics.items() if metrics.writes[name] > self._writes.get(name, 0)}
        logs |= {name.replace("/", "_"): float(value) for name, value in new.items() if is_number(value)}
        self._logs = logs
        self._call("on_epoch_end", self._epoch(engine), dict(logs))

    def end_run(self, engine: Any) -> None:
        """Calls ``on_train_end`` with the logs of the last epoch."""
        self._call("on_train_end", dict(self._logs))

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch, and the state of the callback if it has one."""
        state = super().state_dict()
        if self._is_stateful():
            current = self.callback.state_dict() if self._loaded is None else self._loaded
            state["callback"] = pack(dict(current), f"{type(self.callback).__name__}.state_dict()")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the sums and the callback's state, which is loaded again after ``on_train_begin`` has reset it."""
        super().load_state_dict(state)
        if self._is_stateful() and "callback" in state:
            self._loaded = state["callback"]
            self.callback.load_state_dict(self._loaded)

    def describe(self) -> str:
        """This class and the callback's class."""
        return f"KerasStyle({type(self.callback).__name__})"

    def _is_stateful(self) -> bool:
        return all(callable(getattr(self.callback, name, None)) for name in ("state_dict", "load_state_dict"))

    def _epoch(self, engine: Any) -> int:
        return int(engine.state.epoch) - 1 + FIRST[self.style]

    def _batch(self, engine: Any) -> int:
        return int(engine.epoch_iteration) - 1 + FIRST[self.style]

    def _call(self, name: str, *args: Any) -> None:
        """Calls a method that the callback may have, and ends the run if the callback requests that."""
        method = self.methods.get(name)
        if method is None:
            return
        method(*args)
        if self.model.stop_training and name != "on_train_end":
            stop(self.engine, f"{type(self.callback).__name__} has set model.stop_training")
