"""The processes of one run as one: they begin with the same plan, and stop, save and raise at the same moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ignite.engine import Engine, Events

from camshaft.distributed.collectives import all_gather_object, all_reduce_max
from camshaft.distributed.failures import Failures
from camshaft.distributed.gradient_sync import Replicas, check_wrapped
from camshaft.events import Priority

if TYPE_CHECKING:
    from camshaft.engines.trainer import Trainer

__all__ = ["Coordinator"]


class Coordinator:
    """What the processes of a run decide together.

    Whoever asks on one process for the end of the run, of the epoch or for a checkpoint only makes a wish. After each
    iteration, at the beginning and at the end of each epoch the wishes are compared, in one transfer of a few numbers from
    host to host, and what one process wishes is done by all.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.stop_reason_requested: str | None = None
        self.skip_completed_requested = False
        self.epoch_end_requested = False
        self.interrupt_requested = False
        self.failures = Failures()
        """Where each process writes down why it has left."""
        trainer.add_event_handler_at(1001, Events.STARTED, self.sync_requests)
        trainer.add_event_handler_at(1001, Events.EPOCH_STARTED, self.sync_requests)
        trainer.add_event_handler_at(Priority.AGREE, Events.ITERATION_COMPLETED, self.sync_requests)
        trainer.add_event_handler_at(Priority.AGREE, Events.EPOCH_COMPLETED, self.sync_requests)
        trainer.add_event_handler_at(Priority.AGREE + 1, Events.EPOCH_COMPLETED, self.check_same)

    def begin(self) -> None:
        """Sees at the beginning of a run that every process is about to do the same.

        Raises:
            RuntimeError: where a model is trained that isn't wrapped or is captured, or the processes have different plans.
        """
        trainer, state = self.trainer, self.trainer.state
        self.stop_reason_requested = None
        self.epoch_end_requested = self.skip_completed_requested = self.interrupt_requested = False
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
        for other, its_plan in enumerate(all_gather_object(plan)):
            for what, value in its_plan.items():
                if value != plan[what]:
                    raise RuntimeError(
                        f"every process must train by one plan, but {what}: {plan[what]} here, {value} on rank {other}. "
                        "Attach handlers on every rank (rank 0 alone writes all the same), and give each as many batches: "
                        "DistributedSampler does"
                    )

    def ask_to_stop(self, reason: str, skip_completed: bool) -> None:
        """Wishes for the end of the run."""
        self.stop_reason_requested = self.stop_reason_requested or reason
        self.skip_completed_requested = self.skip_completed_requested or skip_completed

    def sync_requests(self) -> None:
        """Compares the wishes, and does what any process wishes."""
        trainer = self.trainer
        wishing = [handler for handler in trainer.handlers.values() if hasattr(handler, "requests_checkpoint")]
        wishes = [
            self.stop_reason_requested is not None,
            self.skip_completed_requested,
            self.epoch_end_requested,
            self.interrupt_requested,
            trainer.exit_code or 0,
            *(handler.requests_checkpoint(trainer) for handler in wishing),
        ]
        stop, skip_completed, end_epoch, interrupt, exit_code, *agreed = all_reduce_max([int(wish) for wish in wishes])
        for handler, grant in zip(wishing, agreed, strict=True):
            handler.agreed = bool(grant)
        trainer.exit_code = exit_code or None
        if self._must_finish_window():
            return
        if stop:
            reasons = all_gather_object(self.stop_reason_requested)
            number, reason = next((number, text) for number, text in enumerate(reasons) if text is not None)
            trainer.state.stop_reason = reason if self.stop_reason_requested == reason else f"{reason} (on rank {number})"
            trainer.stop_requested = True
            Engine.terminate(trainer, bool(skip_completed))
        if end_epoch:
            self.epoch_end_requested = False
            Engine.terminate_epoch(trainer)
        if interrupt:
            self.interrupt_requested = False
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

    def _must_finish_window(self) -> bool:
        """Whether an open window has gradients that FSDP2 can't reduce any more; the wishes wait for its end."""
        return any(phase.replicas is not None and phase.replicas.waiting and phase.replicas.shards for phase in self._phases())

    def _phases(self) -> list[Any]:
        return list(self.trainer.phases.values())
