"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from camshaft.distributed.dtensors import distribute_like, local_tensor
from camshaft.events import Priority, StepEvents
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

    Uses torch's ``AveragedModel``; buffers (BatchNorm statistics) are copied. The average is saved in every checkpoint. Under
    FSDP2 each rank averages its shards, and :meth:`swapped_in` must be used on every rank.

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
        self.averaged: AveragedModel | ShardedAverage | None = None
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
            self.averaged = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))  # type: ignore[no-untyped-call]
            self.averaged.requires_grad_(False)

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED, priority=Priority.AVERAGE)
    def update(self, engine: Any) -> None:
        """Updates the average with the new weights."""
        if engine.state.phase != self._phase_name:
            return
        assert self.averaged is not None
        assert self._model is not None
        self.averaged.update_parameters(self._model)
        if isinstance(self.averaged, ShardedAverage):
            return
        for average, buffer in zip(self.averaged.module.buffers(), self._model.buffers(), strict=True):
            average.copy_(buffer)

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
        return {"module": self._averaged_state(), "updates": self.averaged.n_averaged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the average from a checkpoint."""
        if self.averaged is None or not state:
            return
        if isinstance(self.averaged, ShardedAverage):
            self.averaged.load(state["module"])
        else:
            load_plain_state_dict(self.module, state["module"])
        self.averaged.n_averaged.copy_(state["updates"])


class ShardedAverage:
    """The average of a model under FSDP2: what ``AveragedModel`` does, applied to the shards of each rank.

    Args:
        model: the model under ``fully_shard``.
        decay: the decay rate of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Any] = copy.deepcopy(plain_state_dict(model))
        """The averaged parameters and the copied buffers, sharded like those of the model."""
        self.n_averaged = torch.tensor(0)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Updates the average with the new weights and copies the buffers; the first update copies the weights too."""
        trained = plain_named_parameters(model) if self.n_averaged else {}
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
        self.n_averaged += 1

    def load(self, state: Mapping[str, Any]) -> None:
        """Loads a saved average, full or sharded; every rank must call it."""
        state = strip_wrapper_prefixes(state, self.state)
        for name, own in self.state.items():
            if isinstance(own, torch.Tensor):
                own.copy_(distribute_like(state[name], own))
