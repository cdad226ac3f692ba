"""How the phases of a trainer take turns in an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from camshaft.engines.phase import Phase

__all__ = ["check_phases", "run_followers", "run_iteration", "show_main_clock"]


def run_iteration(trainer: Any, batch: Any) -> Any:
    """One iteration: a batch for the first phase, then the other phases' turns; returns ``state.output``."""
    primary = trainer.primary
    if primary.frozen:
        with primary.frozen_modules():
            completed = primary.run(trainer, batch)
    else:
        completed = primary.run(trainer, batch)
    if trainer.followers:
        trainer.last_batch = batch
        run_followers(trainer, completed)
    return trainer.state.loss if trainer.output is None else trainer.output(trainer)


def run_followers(trainer: Any, completed: bool) -> None:
    """Gives the other phases their turn after a completed step of the first."""
    for phase in trainer.followers:
        if completed and trainer.primary.optimizer_step % phase.interval == 0:
            phase.run_window(trainer, trainer.last_batch)
    show_main_clock(trainer)


def show_main_clock(trainer: Any) -> None:
    """Sets ``state.optimizer_step`` between iterations, when it is the clock of the last phase."""
    main = list(trainer.phases.values())[-1]
    trainer.state.optimizer_step, trainer.state.skipped_steps = main.optimizer_step, main.skipped_steps


def check_phases(phases: Sequence[Phase]) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the phases can't make a trainer."""
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise TypeError(f"phases must be a sequence of at least one Phase, got {phases!r}")
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise ValueError(f"every phase needs a name of its own, got {names}")
    if any(phase.device.type == "meta" for phase in phases):
        raise ValueError(
            "the model is on 'meta', where parameters have no values: nothing would be trained. Call "
            "model.to_empty(device=...) and load or initialize its weights before you make the optimizer"
        )
    owner: dict[int, str] = {}
    for phase in phases:
        for parameter in phase.parameters():
            other = owner.setdefault(id(parameter), phase.name)
            if other != phase.name:
                raise ValueError(
                    f"the optimizers of phases {other!r} and {phase.name!r} hold the same parameters; "
                    "make each from its own network's parameters()"
                )
