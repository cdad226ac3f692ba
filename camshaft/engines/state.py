"""The state of a trainer."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import State

from camshaft.events import STEP_CLOCKS
from camshaft.metrics import Metrics

__all__ = ["TrainerState"]


class TrainerState(State):
    """``trainer.state``: Ignite's fields, the optimizer-step clock, and the tensors of this iteration."""

    optimizer_step: int = 0
    """The number of completed optimizer steps; from ``GRADIENTS_READY`` on, the number of the current step."""
    skipped_steps: int = 0
    """The number of optimizer steps that the scaler or a handler has skipped."""
    phase: str = ""
    """The name of the phase whose events are firing."""
    x: Any = None
    y: Any = None
    y_pred: Any = None
    loss: Any = None
    """The undivided loss of this batch, on the device."""
    grad_norm: torch.Tensor | None = None
    """The gradient's total norm before clipping, on the device; ``None`` if no handler measures it."""
    stop_reason: str | None = None
    """Why the run ended early."""
    epoch_is_open: bool = False
    """Whether an epoch has started whose ``EPOCH_COMPLETED`` has not fired yet."""

    def __init__(self) -> None:
        self._metrics = Metrics()
        super().__init__()
        self.losses: dict[str, Any] = {}
        """The named losses that the objectives return, detached."""

    @classmethod
    def adopt(cls, state: State) -> TrainerState:
        """A state as it is, or a user's ``State()`` with the fields that a trainer needs."""
        if isinstance(state, cls):
            return state
        adopted = cls()
        for name, value in vars(state).items():
            setattr(adopted, name, value)
        return adopted

    def __repr__(self) -> str:
        return super().__repr__().replace(f"_metrics: {type(self._metrics)}", f"metrics: {dict(self._metrics)}")

    @property
    def metrics(self) -> Metrics:
        """Evaluation results under ``"<prefix>/<metric>"``."""
        return self._metrics

    @metrics.setter
    def metrics(self, values: dict[str, Any]) -> None:
        self._metrics = values if isinstance(values, Metrics) else self._metrics.replaced(values)

    def get_event_attrib_value(self, event_name: Any) -> int:
        """The value of an event's clock."""
        clock = STEP_CLOCKS.get(getattr(event_name, "name", event_name))
        return super().get_event_attrib_value(event_name) if clock is None else int(getattr(self, clock))
