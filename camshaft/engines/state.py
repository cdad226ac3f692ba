"""What ``trainer.state`` holds."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import State

from camshaft.events import STEP_CLOCKS
from camshaft.metrics import Metrics

__all__ = ["TrainerState"]


class TrainerState(State):
    """``trainer.state``: Ignite's fields, the second clock, and this iteration's tensors."""

    optimizer_step: int = 0
    """The number of optimizer steps completed; while a step's events fire, the number of the one being made."""
    skipped_steps: int = 0
    """How many optimizer steps the scaler or a guard refused."""
    phase: str = ""
    """The name of the phase whose events fire."""
    x: Any = None
    y: Any = None
    y_pred: Any = None
    loss: Any = None
    """The undivided loss of this batch, on the device."""
    grad_norm: torch.Tensor | None = None
    """The gradient's total norm before clipping, on the device; ``None`` where nobody measures it."""
    stop_reason: str | None = None
    """Why the run ended early."""
    epoch_is_open: bool = False
    """Whether an epoch has begun whose ``EPOCH_COMPLETED`` has not fired yet."""

    def __init__(self) -> None:
        self._metrics = Metrics()
        super().__init__()
        self.losses: dict[str, Any] = {}
        """The named entries of the objectives' mappings, detached."""

    @property
    def metrics(self) -> Metrics:
        """Evaluation results under ``"<prefix>/<metric>"``."""
        return self._metrics

    @metrics.setter
    def metrics(self, values: dict[str, Any]) -> None:
        self._metrics = values if isinstance(values, Metrics) else self._metrics.replaced(values)

    def get_event_attrib_value(self, event_name: Any) -> int:
        """The value of the clock on which an event counts."""
        clock = STEP_CLOCKS.get(getattr(event_name, "name", event_name))
        return super().get_event_attrib_value(event_name) if clock is None else int(getattr(self, clock))
