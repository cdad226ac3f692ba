"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from camshaft.distributed.dtensors import distribute_like, local_tensor
from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, on
from camshaft.models import (
    is_sharded,
    load_plain_state_dict,
    plain_named_parameters,
    plain_state_dict,
    strip_wrapper_prefixes,
    unwrap,
)
from camshaft.validation import as_float

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage(Handler):
    """Keeps an exponential moving average of the weights, updated once per completed optimizer step.

    The first update copies the weights, as torch's ``AveragedModel`` does; buffers (BatchNorm statistics) are always copied.
    Nothing waits for the device. The average is saved in every checkpoint. Under FSDP2 each rank averages its shards, and
    :meth:`swapped_in` must be used on every rank.

    Args:
        decay: the decay rate, between 0 and 1: ``average = decay * average + (1 - decay) * weights``.
        phase: the phase whose model is averaged; by default the last (in a GAN the generator).

    Raises:
        ValueError: if ``decay`` is not between 0 and 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from camshaft import create_trainer
        >>> model = nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.mse_loss)
        >>> ema = ExponentialMovingAverage(0.99).attach(trainer)
        >>> with ema.swapped_in():  # the model has the averaged weights here
        ...     y = model(torch.zeros(1, 8))
    """

    def __init__(self, decay: float = 0.999, *, phase: str | None = None) -> None:
        self.decay, self.phase = as_float(decay), phase
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be a number between 0 and 1, got {decay!r}")
        self.averaged: ModuleAverage | ShardedAverage | None = None
        self._model: nn.Module | None = None
        self._phase_name = ""

    @property
    def module(self) -> nn.Module:
        """The averaged model, a copy of the trained one.

        Raises:
            RuntimeError: if the handler has not been attached, or if FSDP2 has sharded the model, which can't be copied.
        """
        if self.averaged is None:
            raise RuntimeError("ExponentialMovingAverage has no average before it is attached to a trainer")
        if isinstance(self.averaged, ShardedAverage):
            raise RuntimeError(
                "a model under fully_shard can't be copied, so its average is not a module. Use it by "
                "'with ema.swapped_in() as model:' on every rank, or by Evaluation(..., ema=ema)"
            )
        return self.averaged.module

    def on_attach(self, engine: Any) -> None:
        """Copies the model, which is the first average."""
        phase = engine.phases_named(self.phase)[-1]
        self._model, self._phase_name = unwrap(phase.module), phase.name
        if self.averaged is None and is_sharded(self._model):
            self.averaged = ShardedAverage(self._model, self.decay)
        elif self.averaged is None:
            self.averaged = ModuleAverage(self._model, self.decay)

    @on(Events.EPOCH_STARTED)
    def look_up_tensors(self, engine: Any) -> None:
        """Finds the tensors to average: the model may have got others since the last epoch."""
        assert self.averaged is not None
        assert self._model is not None
        self.averaged.look_up_tensors(self._model)

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED, priority=Priority.AVERAGE)
    def update(self, engine: Any) -> None:
        """Updates the average with the new weights."""
        if engine.state.phase != self._phase_name:
            return
        assert self.averaged is not None
        assert self._model is not None
        phase = engine.phases[self._phase_name]
        self.averaged.update(self._model, phase)

    @contextmanager
    def swapped_in(self) -> Iterator[nn.Module]:
        """Gives the trained model the averaged weights inside the block, and its own afterwards.

        Yields:
            The trained model.
        """
        average, model = self._averaged_state(), self._model
        assert model is not None
        kept = copy.deepcopy(model.state_dict())
        load_plain_state_dict(model, average)
        try:
            yield model
        finally:
            model.load_state_dict(kept)

    def _averaged_state(self) -> dict[str, Any]:
        """The averaged weights, under the names of the model."""
        return self.averaged.state if isinstance(self.averaged, ShardedAverage) else plain_state_dict(self.module)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        if self.averaged is None:
            return {}
        return {"module": self._averaged_state(), "updates": torch.tensor(self.averaged.updates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the average from a checkpoint."""
        if self.averaged is None or not state:
            return
        if isinstance(self.averaged, ShardedAverage):
            self.averaged.load(state["module"])
        else:
            load_plain_state_dict(self.module, state["module"])
        self.averaged.updates = int(state["updates"])


class ModuleAverage:
    """The average of a model as a copy of it.

    Args:
        model: the model.
        decay: the decay rate of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = copy.deepcopy(model).requires_grad_(False), decay, 0
        self.look_up_tensors(model)

    def look_up_tensors(self, model: nn.Module) -> None:
        """Lists the tensors that are averaged and those that are copied, because walking through a model takes time."""
        averaged: list[tuple[torch.Tensor, torch.Tensor]] = []
        copied = list(zip(self.module.buffers(), model.buffers(), strict=True))
        for own, weight in zip(self.module.parameters(), model.parameters(), strict=True):
            (averaged if weight.is_floating_point() or weight.is_complex() else copied).append((own, weight))
        self._averaged, self._copied = grouped(averaged), grouped(copied)
        self._written = [own for own, _ in averaged + copied]

    def update(self, model: nn.Module, phase: Any) -> None:
        """Updates the average with the new weights of a phase."""
        is_first = self.updates == 0
        averaged, copied = ([], self._averaged + self._copied) if is_first else (self._averaged, self._copied)

        @torch.no_grad()
        def write() -> None:
            for averages, weights in averaged:
                torch._foreach_lerp_(averages, weights, 1 - self.decay)
            for copies, originals in copied:
                torch._foreach_copy_(copies, originals)

        phase.execution.after_step(phase, (is_first, self.decay), self._written, write)
        self.updates += 1


def grouped(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Pairs of tensors as two lists for each device and dtype, which is what torch has fast kernels for."""
    groups: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for own, other in pairs:
        owns, others = groups.setdefault((own.device, own.dtype, other.device, other.dtype), ([], []))
        owns.append(own)
        others.append(other)
    return list(groups.values())


class ShardedAverage:
    """The average of a model under FSDP2: the same, applied to the shards of each rank.

    Args:
        model: the model under ``fully_shard``.
        decay: the decay rate of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Any] = copy.deepcopy(plain_state_dict(model))
        """The averaged parameters and the copied buffers, sharded like those of the model."""
        self.updates = 0

    def look_up_tensors(self, model: nn.Module) -> None:
        """Does nothing: the shards are looked up at each update."""

    @torch.no_grad()
    def update(self, model: nn.Module, phase: Any) -> None:
        """Updates the average with the new weights and copies the buffers; the first update copies the weights too."""
        trained = plain_named_parameters(model) if self.updates else {}
        averages: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for name, value in plain_state_dict(model).items():
            if name in trained and value.is_floating_point():
                averages.append(local_tensor(self.state[name]))
                weights.append(local_tensor(value))
            elif isinstance(value, torch.Tensor):
                local_tensor(self.state[name]).copy_(local_tensor(value))
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        self.updates += 1

    def load(self, state: Mapping[str, Any]) -> None:
        """Loads a saved average, full or sharded; every rank must call it."""
        state = strip_wrapper_prefixes(state, self.state)
        for name, own in self.state.items():
            if isinstance(own, torch.Tensor):
                own.copy_(distribute_like(state[name], own))
