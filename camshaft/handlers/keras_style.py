"""Callbacks as Keras and Poutyne have them, on the clocks of a trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from camshaft.distributed.collectives import all_reduce, world_size
from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, Listener, on, stop
from camshaft.models import unwrap
from camshaft.pytree import num_samples
from camshaft.serialization import pack

__all__ = ["KerasStyle", "METHODS"]

METHODS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_backward_end",
    "on_train_batch_end",
    "on_epoch_end",
    "on_train_end",
)
"""The methods of a callback that are called, in the order of a run."""

OLD_NAMES = {"on_train_batch_begin": "on_batch_begin", "on_train_batch_end": "on_batch_end"}
"""Keras's older names, for a callback that hasn't the newer ones."""

LIBRARIES = ("keras", "poutyne", "tf_keras")
"""Their ``Callback`` has every method, and none of them does anything."""

FIRST = {"keras": 0, "poutyne": 1}
"""The number of the first epoch, and of an epoch's first batch."""


class KerasStyle(Handler):
    """Attaches a callback that was written for Keras or Poutyne, or any object with some of their methods.

    What is called, and when:

    - ``on_train_begin(logs)`` at ``STARTED``, that of a resumed run included; ``on_train_end(logs)`` at ``COMPLETED``.
    - ``on_epoch_begin(epoch, logs)`` at ``EPOCH_STARTED``, and not again where an epoch is resumed in its middle.
    - ``on_epoch_end(epoch, logs)`` at ``EPOCH_COMPLETED``, after evaluation and before the checkpoint.
    - ``on_train_batch_begin(batch, logs)`` and ``on_train_batch_end(batch, logs)`` around each iteration; a callback without
      them may have ``on_batch_begin`` and ``on_batch_end``.
    - ``on_backward_end(batch)`` at ``GRADIENTS_READY``: once per window if the gradient is the true one, before clipping.

    Methods for validation, test and prediction are never called: an evaluator is an engine of its own.

    In the logs of a batch are ``loss`` and what ``compute_loss`` names beside it; they are fetched from the device when the
    callback reads them, and not before. In those of an epoch, and of the end of the run, are their means over the epoch's
    samples and the metrics that were written in this epoch, ``val/accuracy`` as ``val_accuracy``. The other logs are empty.
    With several processes each has the callback, the means are over all of them, and what one of them stops ends for all.

    ``set_params`` gets ``epochs``, ``steps`` (batches per epoch) and ``verbose``. ``set_model`` gets an object with
    ``network``, ``optimizer``, ``device`` and ``metrics_names``, which is the network in everything else, and whose
    ``stop_training = True`` ends the run. The state of a callback with ``state_dict`` and ``load_state_dict`` travels in
    every checkpoint; when a run is resumed it is loaded after ``on_train_begin``.

    Args:
        callback: the object.
        style: ``"keras"`` counts epochs and batches from 0; ``"poutyne"`` counts from 1 and adds ``epoch`` and ``time`` to the
            logs of an epoch, and ``batch``, ``size`` and ``time`` to those of a batch. By default what the callback's base
            class is from, and ``"keras"`` for any other.
        metrics_names: what Poutyne's loggers ask the model for: the names of their columns, without ``val_``.

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
        methods = {name: method_of(callback, name) or method_of(callback, OLD_NAMES.get(name, name)) for name in METHODS}
        self.methods = {name: method for name, method in methods.items() if method is not None}
        if not self.methods:
            raise TypeError(
                f"callback must have at least one of the methods {', '.join(METHODS)}; got {type(callback).__name__} with none"
            )
        if style is not None and style not in FIRST:
            raise ValueError(f"style must be 'keras', 'poutyne' or None, got {style!r}")
        self.callback, self.metrics_names = callback, list(metrics_names)
        self.style = style or ("poutyne" if "poutyne" in map(library, type(callback).__mro__) else "keras")
        if "on_backward_end" in self.methods:
            self.changes = ("gradients",)  # type: ignore[misc]
        self.totals: dict[str, Any] = {}
        """The sum over this epoch's samples of each loss, on the device."""
        self.samples = 0
        self._logs: dict[str, Any] = {}
        self._loaded: Mapping[str, Any] | None = None
        self._epoch_began = self._batch_ended = 0.0
        self._writes: Mapping[str, int] = {}

    def default_name(self) -> str:
        """The class's name and the callback's."""
        return f"KerasStyle/{type(self.callback).__name__}"

    def listeners(self) -> Iterator[Listener]:
        """The events of the methods that the callback has."""
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
        """Makes what the callback sees as its model."""
        self.model = ModelView(list(engine.phases.values())[-1], self.metrics_names)

    @on(Events.STARTED)
    def begin_run(self, engine: Any) -> None:
        """Hands the model over; a resumed callback has its state again after its own beginning."""
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
        """Begins the epoch's sums."""
        self.totals, self.samples = {}, 0
        self._epoch_began = self._batch_ended = time.perf_counter()
        self._writes = dict(engine.state.metrics.writes)
        self._call("on_epoch_begin", self._epoch(engine), {})

    def begin_batch(self, engine: Any) -> None:
        """Before a batch."""
        self._call("on_train_batch_begin", self._batch(engine), {})

    def end_backward(self, engine: Any) -> None:
        """If the gradient of a window is ready."""
        self._call("on_backward_end", self._batch(engine))

    def sum_losses(self, engine: Any) -> None:
        """Adds a batch's losses to the epoch's, on the device."""
        size = num_samples(engine.state.batch) or 1
        self.samples += size
        for name, value in losses_of(engine).items():
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                value = value.float()  # a sum of many would be too coarse, or overflow
            self.totals[name] = value * size + self.totals.get(name, 0.0)

    def end_batch(self, engine: Any) -> None:
        """After a batch, with losses that stay on the device until they are read."""
        logs: dict[str, Any] = {}
        if self.style == "poutyne":
            now = time.perf_counter()
            size = num_samples(engine.state.batch)
            logs = {"batch": self._batch(engine), "size": size, "time": now - self._batch_ended}
            self._batch_ended = now
        self._call("on_train_batch_end", self._batch(engine), Logs(logs | losses_of(engine)))

    def end_epoch(self, engine: Any) -> None:
        """After an epoch, with its means and metrics."""
        logs: dict[str, Any] = {}
        if self.style == "poutyne":
            logs = {"epoch": self._epoch(engine), "time": time.perf_counter() - self._epoch_began}
        logs |= means(self.totals, self.samples)
        metrics = engine.state.metrics
        fresh = {name: value for name, value in metrics.items() if metrics.writes[name] > self._writes.get(name, 0)}
        logs |= {name.replace("/", "_"): float(value) for name, value in fresh.items() if is_number(value)}
        self._logs = logs
        self._call("on_epoch_end", self._epoch(engine), dict(logs))

    def end_run(self, engine: Any) -> None:
        """After the run, with the last epoch's logs."""
        self._call("on_train_end", dict(self._logs))

    def state_dict(self) -> dict[str, Any]:
        """The epoch's sums, and the callback's own state if it has one."""
        state = super().state_dict()
        if self._is_stateful():
            held = self.callback.state_dict() if self._loaded is None else self._loaded
            state["callback"] = pack(dict(held), f"{type(self.callback).__name__}.state_dict()")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a checkpoint; the callback once more after its ``on_train_begin``, which begins afresh."""
        super().load_state_dict(state)
        if self._is_stateful() and "callback" in state:
            self._loaded = state["callback"]
            self.callback.load_state_dict(self._loaded)

    def describe(self) -> str:
        """The callback's kind."""
        return f"KerasStyle({type(self.callback).__name__})"

    def _is_stateful(self) -> bool:
        return all(callable(getattr(self.callback, name, None)) for name in ("state_dict", "load_state_dict"))

    def _epoch(self, engine: Any) -> int:
        return int(engine.state.epoch) - 1 + FIRST[self.style]

    def _batch(self, engine: Any) -> int:
        return int(engine.epoch_iteration) - 1 + FIRST[self.style]

    def _call(self, name: str, *args: Any) -> None:
        """Calls one of the callback's methods if it has it, and ends the run if it has asked for that."""
        method = self.methods.get(name)
        if method is None:
            return
        method(*args)
        if self.model.stop_training and name != "on_train_end":
            stop(self.engine, f"{type(self.callback).__name__} has set model.stop_training")


class ModelView:
    """What a callback knows as its model: the network, with the names that Keras and Poutyne give to what is around it."""

    def __init__(self, phase: Any, metrics_names: list[str]) -> None:
        self.network = unwrap(phase.module)
        self.optimizer, self.device, self.metrics_names = phase.optimizers[0], phase.device, metrics_names
        self.stop_training = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        network = vars(self).get("network")
        try:
            return getattr(network, name)
        except AttributeError:
            raise AttributeError(
                f"the model that KerasStyle hands to a callback has no {name!r}: it has network, optimizer, device, "
                f"metrics_names, stop_training, and whatever the {type(network).__name__} has"
            ) from None


class Logs(MutableMapping[str, Any]):
    """A batch's logs: a tensor becomes a number when it is read, for only then must the host wait for the device."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, torch.Tensor):
            self._values[key] = value = value.item()
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict[str, Any]:
        """All of it as a plain dict, fetched."""
        return dict(self)


def losses_of(engine: Any) -> dict[str, Any]:
    """This iteration's loss and named losses; a trainer with several phases has named ones alone."""
    state = engine.state
    named = {name: value for name, value in state.losses.items() if is_number(value)}
    return {"loss": state.loss} | named if len(engine.phases) == 1 else named


def means(totals: Mapping[str, Any], samples: int) -> dict[str, float]:
    """Sums over samples as means, over the samples of all processes if there are several."""
    if world_size() == 1 or not totals:
        return {name: float(total) / samples for name, total in totals.items()}
    device = next((total.device for total in totals.values() if isinstance(total, torch.Tensor)), None)
    parts = [torch.as_tensor(part).to(device, torch.float64).reshape(()) for part in (*totals.values(), samples)]
    together = torch.stack(parts)
    all_reduce(together)
    *sums, samples = together.tolist()
    return {name: total / samples for name, total in zip(totals, sums, strict=True)}


def is_number(value: Any) -> bool:
    """Whether a value is a single number, on a device or not."""
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def library(cls: type) -> str:
    """The package that a class is from."""
    return cls.__module__.partition(".")[0]


def method_of(callback: Any, name: str) -> Callable[..., Any] | None:
    """A callback's method, unless it has none or only its library's, which does nothing."""
    method = getattr(callback, name, None)
    if not callable(method):
        return None
    owner = next((cls for cls in type(callback).__mro__ if name in vars(cls)), None)
    inherited = owner is not None and owner.__name__ == "Callback" and library(owner) in LIBRARIES
    return None if inherited and name not in vars(callback) else method
