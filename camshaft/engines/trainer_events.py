"""What a trainer does on its own events.

These are functions, not bound methods: the trainer holds its handlers, and must not hold a reference to itself.
"""

from __future__ import annotations

import logging
from typing import Any

from ignite.engine import Events

from camshaft.engines.alternation import show_main_clock
from camshaft.engines.run_state import RunStatus
from camshaft.resume.metric_state import restore_metrics
from camshaft.rng import restore_rng

__all__ = ["add_trainer_events", "remember_modes", "warn_of_skipped_batches"]


logger = logging.getLogger("camshaft")


def add_trainer_events(trainer: Any) -> None:
    """Adds these functions to a new trainer."""
    trainer.add_event_handler_at(-1000, Events.STARTED, begin_run)
    trainer.add_event_handler_at(1000, Events.STARTED, restore_before_data)
    trainer.add_event_handler_at(-1000, Events.EPOCH_STARTED, abandon_open_windows)
    trainer.add_event_handler_at(1000, Events.EPOCH_STARTED, remember_modes)
    trainer.add_event_handler_at(-1000, Events.EPOCH_COMPLETED, remember_modes)  # before a user's model.eval()


def begin_run(trainer: Any) -> None:
    """Runs first at ``STARTED``: a new run starts its clocks at 0, a resumed one keeps them."""
    state = trainer.state
    state.stop_reason = None
    trainer.unclaimed = {}
    state.phase = trainer.primary.name
    is_new = trainer.run_state.checkpoint is None and state.iteration == 0
    for phase in trainer.phases.values():
        phase.remember_modes()
        phase.is_known_to_train = False
        if is_new:
            phase.optimizer_step = phase.skipped_steps = phase.forward_passes = 0
            state.losses.clear()
    trainer.coordinator.begin_run(trainer)
    trainer.run_state.steps_before = trainer.steps_attempted
    show_main_clock(trainer)


def restore_before_data(trainer: Any) -> None:
    """Runs last at ``STARTED``: restores a resumed run's random state, and does not start its open epoch again."""
    checkpoint = trainer.run_state.checkpoint
    if checkpoint is None:
        return
    restore_metrics(trainer, checkpoint["epoch_metrics"], trainer.state.epoch_is_open)
    restore_rng(checkpoint["rng"])
    if trainer.state.epoch_is_open:
        trainer._mute(Events.EPOCH_STARTED)  # until the data is set up, which comes next


def warn_of_skipped_batches(trainer: Any) -> None:
    """Warns before a new run about the batches of an epoch that an exception has cut short."""
    state = trainer.state
    if trainer.run_state.status is not RunStatus.FAILED or not state.epoch_is_open or trainer._is_done(state):
        return
    if trainer.epoch_iteration == state.epoch_length:
        return
    of = "" if state.epoch_length is None else f" of {state.epoch_length}"
    logger.warning(
        "the last run failed in epoch %d, after %d%s batches: the rest of that epoch is skipped, and its open window is "
        "discarded. To continue at the next batch, resume from a checkpoint",
        state.epoch, trainer.epoch_iteration, of,
    )  # fmt: skip


def abandon_open_windows(trainer: Any) -> None:
    """Runs first at ``EPOCH_STARTED``: discards a window that an earlier run has left open."""
    for phase in trainer.phases.values():
        if phase.window_is_open:
            phase.abandon_window()


def remember_modes(trainer: Any) -> None:
    """Remembers the submodules that the user has put in eval mode."""
    for phase in trainer.phases.values():
        phase.remember_modes()
