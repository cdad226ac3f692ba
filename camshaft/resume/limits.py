"""How ``run()`` continues from a loaded checkpoint: its limits, and whether there is anything left to do."""

from __future__ import annotations

import logging
from typing import Any

from camshaft.resume.data_position import length_of
from camshaft.resume.ranks import rescale_position

__all__ = ["prepare_resume", "starts_new_run"]

logger = logging.getLogger("camshaft")


def starts_new_run(trainer: Any) -> bool:
    """Whether the user has cleared the limits of a loaded run (Ignite's way to ask for a new one with the loaded weights)."""
    state, is_loaded = trainer.state, trainer.run_state.checkpoint is not None
    return is_loaded and state.iteration > 0 and state.max_epochs is None and state.max_iters is None


def prepare_resume(trainer: Any, data: Any, max_epochs: int | None, max_iters: int | None) -> bool:
    """Gives the trainer the limits of the coming run, and takes back the open epoch, which Ignite counts again.

    This changes the trainer's state, unless it raises.

    Args:
        trainer: the trainer, with a loaded checkpoint.
        data: the data of the coming run.
        max_epochs: the new limit in epochs; by default that of the checkpoint.
        max_iters: the new limit in iterations, instead.

    Returns:
        Whether the limit has been reached already, so that there is nothing to run.

    Raises:
        ValueError: if both limits are given, or the data has another number of batches than that of the checkpoint.
    """
    checkpoint, state = trainer.run_state.checkpoint, trainer.state
    if max_epochs is not None and max_iters is not None:
        raise ValueError("max_epochs and max_iters exclude each other; give only one of them")
    if "processes" in checkpoint:
        rescale_position(trainer, checkpoint, data)
    check_same_length(checkpoint["data"]["length"], length_of(data))
    if max_epochs is not None or max_iters is not None:
        state.max_epochs, state.max_iters = max_epochs, max_iters
    if state.max_epochs is None and state.max_iters is None:
        state.max_epochs = 1
    if trainer._is_done(state):
        logger.warning(nothing_to_do(state))
        return True
    state.epoch = checkpoint["clocks"]["epoch"] - state.epoch_is_open  # not -= 1: an earlier attempt may have failed
    return False


def check_same_length(before: int | None, now: int | None) -> None:
    """Raises ``ValueError`` if the data has another number of batches than that of the checkpoint."""
    if before is not None and now is not None and before != now:
        raise ValueError(
            f"the data has {now} batches, the checkpoint was written with {before}: the run can't resume exactly. Use the "
            "same data and batch size, or start a new run from its weights"
        )


def nothing_to_do(state: Any) -> str:
    """The warning for a run whose limit has been reached before, with what can be done."""
    if state.max_iters is None:
        done, limit, reset = f"{state.epoch} of {state.max_epochs} epochs", "max_epochs", "max_epochs"
    else:
        done, limit = f"{state.iteration} of {state.max_iters} iterations", "max_iters"
        reset = "max_epochs = trainer.state.max_iters"
    return (
        f"nothing to do: {done} are done; raise {limit}, use another folder, or set trainer.state.{reset} = None to start a "
        "new run"
    )
