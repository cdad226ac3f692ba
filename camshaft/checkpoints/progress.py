"""The progress of a trainer, as its checkpoints record it."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any

from camshaft.checkpoints.index import Entry
from camshaft.checkpoints.names import file_name
from camshaft.checkpoints.save_policy import Moment
from camshaft.metrics import as_number

__all__ = ["entry_of", "moment_of", "step_of"]


def moment_of(trainer: Any) -> Moment:
    """The number of iterations, and whether the epoch is open."""
    return trainer.state.iteration, trainer.state.epoch_is_open


def step_of(trainer: Any) -> int:
    """The number of optimizer steps in a checkpoint's name: in a GAN, the discriminator's."""
    step: int = next(iter(trainer.phases.values())).optimizer_step
    return step


def entry_of(trainer: Any, score: float | None, mode: str, sharded: bool) -> Entry:
    """The entry for a checkpoint of the trainer as it is now, with its metrics that are numbers."""
    state, step = trainer.state, step_of(trainer)
    metrics = {name: finite(value) for name, value in state.metrics.items()}
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Entry(
        file_name(step, sharded),
        step,
        state.iteration,
        state.epoch,
        score,
        metrics,
        when,
        mode=None if score is None else mode,
    )


def finite(value: Any) -> float | None:
    """A metric as a finite number; ``None`` if it is none."""
    try:
        number = as_number(value, "metric")
    except TypeError:
        return None
    return number if math.isfinite(number) else None
