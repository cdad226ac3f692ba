"""Requests to stop, to end the epoch, to interrupt or to save, and how several ranks agree on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ignite.engine import Engine, Events

from camshaft.distributed.collectives import all_gather_object, all_reduce_max, until_any_rank_is_exhausted
from camshaft.distributed.failures import Failures
from camshaft.distributed.gradient_sync import ReplicatedGradients
from camshaft.events import Priority
from camshaft.handler import Handler

__all__ = ["Coordinator", "RankCoordinator"]

LAST = 1001
"""The priority after all handlers of ``STARTED`` and ``EPOCH_STARTED``, whose requests count before the first batch."""


class Coordinator:
    """Carries out the requests of a single process at once.

    Every method gets the trainer, which holds its coordinator.
    """

    is_distributed = False
    """Whether other processes train too."""

    @contextmanager
    def attributing_failures(self, trainer: Any, *, is_new: bool) -> Iterator[None]:
        """Encloses a run. If the failure of another rank causes an exception, raises one that names that rank instead.

        Args:
            trainer: the trainer.
            is_new: whether the run does not continue an interrupted one.
        """
        yield

    def begin_run(self, trainer: Any) -> None:
        """Called at ``STARTED``."""

    def terminate(self, trainer: Any, reason: str, skip_completed: bool) -> None:
        """Ends the run after the current event, and records the reason."""
        Engine.terminate(trainer, skip_completed)
        if trainer.state.stop_reason is None:
            trainer.state.stop_reason = reason

    def terminate_epoch(self, trainer: Any, skip_completed: bool) -> None:
        """Ends the epoch after the current event."""
        Engine.terminate_epoch(trainer, skip_completed)

    def interrupt(self, trainer: Any) -> None:
        """Interrupts the run after the current event."""
        Engine.interrupt(trainer)

    def checkpoint_is_requested(self, trainer: Any, handler: Handler) -> bool:
        """Whether the checkpoint that a handler requests must be saved now, on every rank."""
        return handler.requests_checkpoint(trainer)

    def any_rank(self, flag: bool) -> bool:
        """Whether a flag is true on any rank."""
        return flag

    def barrier(self) -> None:
        """Waits for the other ranks."""

    def ending_together(self, batches: Any, length_is_known: bool) -> Any:
        """Batches that end on all ranks at the same time."""
        return batches


class RankCoordinator(Coordinator):
    """Carries out on every rank what any rank requests.

    During a run a request is only recorded. After each iteration, and at the start and the end of each epoch, the ranks compare
    their requests in one transfer of a few numbers between the hosts, and carry them out at the same moment.

    Args:
        trainer: the trainer.
    """

    is_distributed = True

    def __init__(self, trainer: Any) -> None:
        self.failures = Failures()
        self._clear_requests()
        for priority, event, function in (
            (LAST, Events.STARTED, sync_requests),
            (LAST, Events.EPOCH_STARTED, sync_requests),
            (Priority.SYNC, Events.ITERATION_COMPLETED, sync_requests),
            (Priority.SYNC, Events.EPOCH_COMPLETED, sync_requests),
            (Priority.SYNC + 1, Events.EPOCH_COMPLETED, check_weights),
        ):
            trainer.add_event_handler_at(priority, event, function)

    def _clear_requests(self) -> None:
        self.stop_reason: str | None = None
        self.skip_completed = self.epoch_end = self.skip_epoch_completed = self.interruption = False

    @contextmanager
    def attributing_failures(self, trainer: Any, *, is_new: bool) -> Iterator[None]:
        """Encloses a run; restores the models' gradient synchronization after it."""
        if is_new:
            self.failures = Failures()
        try:
            yield
        except BaseException as error:
            where = f"in epoch {trainer.state.epoch}, iteration {trainer.state.iteration}"
            cause = self.failures.attribute(error, where)
            try:
                if cause is error:
                    raise
                raise cause from error
            finally:
                del cause  # its traceback refers to this frame
        finally:
            for phase in trainer.phases.values():
                phase.gradient_sync.restore()

    def begin_run(self, trainer: Any) -> None:
        """Checks that all ranks are about to run the same training.

        Raises:
            RuntimeError: if a model is not wrapped, is captured in CUDA graphs, or the ranks have different plans.
        """
        self._clear_requests()
        for phase in trainer.phases.values():
            phase.execution.check_distributed()
            if isinstance(phase.gradient_sync, ReplicatedGradients):
                phase.gradient_sync.weights_are_checked = False
            else:
                phase.gradient_sync = ReplicatedGradients(phase)
        check_same_plan(plan_of(trainer))

    def terminate(self, trainer: Any, reason: str, skip_completed: bool) -> None:
        """Requests the end of the run."""
        if not trainer.is_running:
            super().terminate(trainer, reason, skip_completed)
            return
        self.stop_reason = self.stop_reason or reason
        self.skip_completed = self.skip_completed or skip_completed

    def terminate_epoch(self, trainer: Any, skip_completed: bool) -> None:
        """Requests the end of the epoch."""
        if trainer.is_running:
            self.epoch_end = True
            self.skip_epoch_completed = self.skip_epoch_completed or skip_completed
        else:
            super().terminate_epoch(trainer, skip_completed)

    def interrupt(self, trainer: Any) -> None:
        """Requests an interruption."""
        if trainer.is_running:
            self.interruption = True
        else:
            super().interrupt(trainer)

    def checkpoint_is_requested(self, trainer: Any, handler: Handler) -> bool:
        """Whether any rank requested a checkpoint when the ranks last compared their requests."""
        return handler.agreed

    def any_rank(self, flag: bool) -> bool:
        """Whether a flag is true on any rank; every rank must call it."""
        return bool(all_reduce_max([flag])[0])

    def barrier(self) -> None:
        """Waits for the other ranks."""
        all_reduce_max([0])

    def ending_together(self, batches: Any, length_is_known: bool) -> Any:
        """Batches that end on every rank when any rank has no more, if their number is unknown."""
        return batches if length_is_known else until_any_rank_is_exhausted(batches)

    def sync(self, trainer: Any) -> None:
        """Compares the requests of all ranks, and carries out what any rank requests."""
        requesting = [h for h in trainer.handlers.values() if type(h).requests_checkpoint is not Handler.requests_checkpoint]
        requests = [
            self.stop_reason is not None,
            self.skip_completed,
            self.epoch_end,
            self.skip_epoch_completed,
            self.interruption,
            trainer.exit_code or 0,
            *(handler.requests_checkpoint(trainer) for handler in requesting),
        ]
        stop, skip, epoch_end, skip_epoch, interruption, exit_code, *agreed = all_reduce_max([int(r) for r in requests])
        for handler, is_agreed in zip(requesting, agreed, strict=True):
            handler.agreed = bool(is_agreed)
        trainer.exit_code = exit_code or None
        if any(phase.gradient_sync.must_finish_window() for phase in trainer.phases.values()):
            return  # the requests wait for the end of the window
        if stop:
            trainer.state.stop_reason = self._first_reason()
            trainer.run_state.stop_requested = True
            Engine.terminate(trainer, bool(skip))
        if epoch_end:
            self.epoch_end = self.skip_epoch_completed = False
            Engine.terminate_epoch(trainer, bool(skip_epoch))
        if interruption:
            self.interruption = False
            Engine.interrupt(trainer)

    def _first_reason(self) -> str:
        """The reason of the lowest rank that requested the end of the run."""
        reasons = all_gather_object(self.stop_reason)
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
        return str(reason) if self.stop_reason == reason else f"{reason} (on rank {rank})"


def sync_requests(trainer: Any) -> None:
    """Compares the requests of all ranks."""
    trainer.coordinator.sync(trainer)


def check_weights(trainer: Any) -> None:
    """Checks after an epoch that all ranks have the same weights."""
    for phase in trainer.phases.values():
        phase.gradient_sync.check_weights(phase)


def plan_of(trainer: Any) -> dict[str, Any]:
    """The settings that must be the same on every rank, by description."""
    state = trainer.state
    return {
        "the number of batches (epoch_length)": state.epoch_length,
        "max_epochs": state.max_epochs,
        "max_iters": state.max_iters,
        "the iteration": state.iteration,
        "the phases": list(trainer.phases),
        "the attached handlers": list(trainer.handlers),
        "the accumulation steps": [phase.window.steps for phase in trainer.phases.values()],
    }


def check_same_plan(plan: dict[str, Any]) -> None:
    """Raises ``RuntimeError`` if another rank has another plan."""
    for other, its_plan in enumerate(all_gather_object(plan)):
        for what, value in its_plan.items():
            if value != plan[what]:
                raise RuntimeError(
                    f"every process must have the same plan, but {what}: {plan[what]} here, {value} on rank {other}. "
                    "Attach handlers on every rank (only rank 0 writes anyway), and give every rank the same number of "
                    "batches: DistributedSampler does"
                )
