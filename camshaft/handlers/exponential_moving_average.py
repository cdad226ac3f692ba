"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from camshaft.events import Handler, Place, StepEvents, on
from camshaft.modules import unwrap

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage(Handler):
    """Keeps an exponential moving average of the weights, updated once per completed optimizer step.

    torch's ``AveragedModel`` underneath; buffers (BatchNorm statistics) are copied. It travels in every checkpoint.

    Args:
        decay: how much of the average is kept at each step, between 0 and 1: ``average = decay * average + (1 - decay) * w``.
        phase: the phase whose model is averaged; the last by default (in a GAN the generator).

    Raises:
        ValueError: where ``decay`` isn't between 0 and 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from camshaft import create_trainer
        >>> model = nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.mse_loss)
        >>> ema = ExponentialMovingAverage(0.99).attach(trainer)
        >>> with ema.swapped_in():  # the model has the averaged weights in here
        ...     y = model(torch.zeros(1, 8))
    """

    def __init__(self, decay: float = 0.999, *, phase: str | None = None) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay < 1:
            raise ValueError(f"decay must be a number between 0 and 1, got {decay!r}")
        self.decay, self.phase = decay, phase
        self.averaged: AveragedModel | None = None
        self._model: nn.Module | None = None
        self._phase_name = ""

    @property
    def module(self) -> nn.Module:
        """The averaged model, a copy of the trained one.

        Raises:
            RuntimeError: where the handler hasn't been attached.
        """
        if self.averaged is None:
            raise RuntimeError("ExponentialMovingAverage has no average before it is attached to a trainer")
        return self.averaged.module

    def on_attach(self, engine: Any) -> None:
        """Copies the model as it is now."""
        phase = engine.phases_named(self.phase)[-1]
        self._model, self._phase_name = unwrap(phase.module), phase.name
        if self.averaged is None:
            self.averaged = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))  # type: ignore[no-untyped-call]
            self.averaged.requires_grad_(False)

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED, place=Place.AVERAGE)
    def update(self, engine: Any) -> None:
        """Takes the new weights into the average."""
        if engine.state.phase != self._phase_name:
            return
        assert self.averaged is not None
        assert self._model is not None
        self.averaged.update_parameters(self._model)
        for average, buffer in zip(self.averaged.module.buffers(), self._model.buffers(), strict=True):
            average.copy_(buffer)

    @contextmanager
    def swapped_in(self) -> Iterator[nn.Module]:
        """The trained model has the averaged weights inside the block, and its own again afterwards.

        Yields:
            The trained model.
        """
        average, model = self.module, self._model
        assert model is not None
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(average.state_dict())
        try:
            yield model
        finally:
            model.load_state_dict(kept)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        if self.averaged is None:
            return {}
        return {"module": dict(self.module.state_dict()), "updates": self.averaged.n_averaged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's average."""
        if self.averaged is not None and state:
            self.module.load_state_dict(state["module"])
            self.averaged.n_averaged.copy_(state["updates"])
