"""The processes of one run as one: they begin with the same plan, and stop, save and raise at the same moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ignite.engine import Engine, Events

from camshaft.distributed import Failures, agreed, everyones
from camshaft.engines.replicas import Replicas, check_wrapped
from camshaft.events import Place

if TYPE_CHECKING:
    from camshaft.engines.trainer import Trainer

__all__ = ["Together"]


class Together:
    """What the processes of a run decide together.

    Whoever asks on one process for the end of the run, of the epoch or for a checkpoint only makes a wish. After each
    iteration, at the beginning and at the end of each epoch the wishes are compared, in one transfer of a few numbers from
    host to host, and what one process wishes is done by all.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.wish_to_stop: str | None = None
        self.wish_to_skip_completed = False
        self.wish_to_end_epoch = False
        self.wish_to_interrupt = False
        self.failures = Failures()
        """Where each process writes down why it has left."""
        trainer.add_event_handler_at(1001, Events.STARTED, self.decide)
        trainer.add_event_handler_at(1001, Events.EPOCH_STARTED, self.decide)
        trainer.add_event_handler_at(Place.AGREE, Events.ITERATION_COMPLETED, self.decide)
        trainer.add_event_handler_at(Place.AGREE, Events.EPOCH_COMPLETED, self.decide)
        trainer.add_event_handler_at(Place.AGREE + 1, Events.EPOCH_COMPLETED, self.check_same)

    def begin(self) -> None:
        """Sees at the beginning of a run that every process is about to do the same.

        Raises:
            RuntimeError: where a model is trained that isn't wrapped or is captured, or the processes have different plans.
        """
        trainer, state = self.trainer, self.trainer.state
        self.wish_to_stop = None
        self.wish_to_end_epoch = self.wish_to_skip_completed = self.wish_to_interrupt = False
        for phase in trainer.phases.values():
            if phase.capture is not None:
                raise RuntimeError(
                    "capture=True is for one process: what the processes send each other can't be recorded; leave it out"
                )
            check_wrapped(phase)
            phase.replicas = phase.replicas or Replicas(phase)
            phase.replicas.checked = False
        plan = {
            "the number of batches (epoch_length)": state.epoch_length,
            "max_epochs": state.max_epochs,
            "max_iters": state.max_iters,
            "the iteration": state.iteration,
            "the phases": list(trainer.phases),
            "the attached handlers": list(trainer.handlers),
            "the accumulation steps": [phase.window.steps for phase in trainer.phases.values()],
        }
        for other, its_plan in enumerate(everyones(plan)):
            for what, value in its_plan.items():
                if value != plan[what]:
                    raise RuntimeError(
                        f"every process must train by one plan, but {what}: {plan[what]} here, {value} on rank {other}. "
                        "Attach handlers on every rank (rank 0 alone writes all the same), and give each as many batches: "
                        "DistributedSampler does"
                    )

    def ask_to_stop(self, reason: str, skip_completed: bool) -> None:
        """Wishes for the end of the run."""
        self.wish_to_stop = self.wish_to_stop or reason
        self.wish_to_skip_completed = self.wish_to_skip_completed or skip_completed

    def decide(self) -> None:
        """Compares the wishes, and does what any process wishes."""
        trainer = self.trainer
        wishing = [handler for handler in trainer.handlers.values() if hasattr(handler, "wish")]
        wishes = [
            self.wish_to_stop is not None,
            self.wish_to_skip_completed,
            self.wish_to_end_epoch,
            self.wish_to_interrupt,
            trainer.exit_code or 0,
            *(handler.wish(trainer) for handler in wishing),
        ]
        stop, skip_completed, end_epoch, interrupt, exit_code, *granted = agreed([int(wish) for wish in wishes])
        for handler, grant in zip(wishing, granted, strict=True):
            handler.granted = bool(grant)
        trainer.exit_code = exit_code or None
        if self._is_held_up():
            return
        if stop:
            reasons = everyones(self.wish_to_stop)
            number, reason = next((number, text) for number, text in enumerate(reasons) if text is not None)
            trainer.state.stop_reason = reason if self.wish_to_stop == reason else f"{reason} (on rank {number})"
            trainer.was_asked_to_stop = True
            Engine.terminate(trainer, bool(skip_completed))
        if end_epoch:
            self.wish_to_end_epoch = False
            Engine.terminate_epoch(trainer)
        if interrupt:
            self.wish_to_interrupt = False
            Engine.interrupt(trainer)

    def check_same(self) -> None:
        """Sees after an epoch that every process has the same weights."""
        for phase in self._phases():
            phase.replicas.check_same()

    def leave(self) -> None:
        """Leaves the models as they were before the run, however it has ended."""
        for phase in self._phases():
            if phase.replicas is not None:
                phase.replicas.leave()

    def _is_held_up(self) -> bool:
        """Whether an open window has gradients that FSDP2 can't reduce any more; the wishes wait for its end."""
        return any(phase.replicas is not None and phase.replicas.waiting and phase.replicas.shards for phase in self._phases())

    def _phases(self) -> list[Any]:
        return list(self.trainer.phases.values())
