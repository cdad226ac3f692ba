"""The trainer: an Ignite engine whose iteration is a training step with events of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Engine, Events, EventsList, State
from ignite.engine.engine import _EngineTerminateException
from torch.utils.data import DataLoader

from camshaft.distributed.collectives import world_size
from camshaft.distributed.coordinator import Coordinator, RankCoordinator
from camshaft.engines.alternation import check_phases, run_followers, run_iteration
from camshaft.engines.loop import LoopEngine
from camshaft.engines.phase import Phase
from camshaft.engines.run_state import RunState, RunStatus
from camshaft.engines.state import TrainerState
from camshaft.engines.trainer_events import add_trainer_events, remember_modes, warn_of_skipped_batches
from camshaft.events import PhaseEvent, StepEvents
from camshaft.handler import Handler
from camshaft.optimizers import group_rates
from camshaft.reports.explain import explain
from camshaft.reports.speed import speed_report
from camshaft.resume.data_position import DataLoaderPosition
from camshaft.resume.limits import prepare_resume, starts_new_run
from camshaft.resume.trainer_state import load_trainer_state, trainer_state_dict
from camshaft.validation import check_optional_count

__all__ = ["Trainer"]


class Trainer(LoopEngine):
    """An Ignite engine that trains one or more phases; made by :func:`create_trainer` and :func:`create_gan_trainer`.

    Whatever works on an ``ignite.engine.Engine`` works on it. For an alternating scheme of your own, make a trainer of
    :class:`Phase` objects: the data drives the first; each other runs a window after its ``interval``-th completed step.

    Args:
        phases: the phases, in order.
        output: called with the trainer after each iteration; returns ``state.output``. By default the detached loss.

    Raises:
        TypeError: if one of ``phases`` is not a :class:`Phase`.
        ValueError: if two phases have the same name, or train the same parameters.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> phase = Phase("model", model, optimizer, lambda engine, batch: model(batch).square().mean())
        >>> Trainer([phase]).run([torch.ones(4, 2)] * 3, max_epochs=2).optimizer_step
        6
    """

    state: TrainerState

    def __init__(self, phases: Sequence[Phase], *, output: Callable[[Trainer], Any] | None = None) -> None:
        check_phases(phases)
        super().__init__(run_iteration)
        self.state = TrainerState()
        # Ignite's loggers look up an event's clock in this global table; the true clocks are the state's
        self.register_events(*StepEvents, event_to_attr=dict.fromkeys(StepEvents, "iteration"))
        self.handlers: dict[str, Handler] = {}
        """The attached handlers of this package, by name."""
        self.unclaimed: dict[str, Any] = {}
        """The states in a loaded checkpoint of handlers that are not attached yet; ``attach`` restores them."""
        self.phases = {phase.name: phase for phase in phases}
        """The phases by name, in order."""
        self.primary, self.followers = phases[0], tuple(phases[1:])
        self.run_state = RunState()
        self.data_position = DataLoaderPosition()
        self.coordinator = Coordinator()
        """Carries out requests to stop or to save; with several processes, together with the other ranks."""
        self.last_batch: Any = None  # for the turns of the followers
        self.exit_code: int | None = None
        """The exit code of the process when the run has ended, set by a handler that was asked to end it."""
        self.output = output
        add_trainer_events(self)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(
        self,
        data: Iterable[Any] | DataLoader[Any] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> State:
        """Trains over the data, as :meth:`ignite.engine.Engine.run` does.

        Args:
            data: batches that can be iterated over again and again (a list or a ``DataLoader``).
            max_epochs: the epoch after which the run ends (default 1); a resumed run continues to count.
            max_iters: the iteration after which it ends, instead.
            epoch_length: the number of batches in an epoch, by default all of ``data``.

        Returns:
            The trainer's state.

        Raises:
            RuntimeError: if the run ends without one optimizer step made or skipped.
            ValueError: if a number is out of range, or the data is not that of the checkpoint.
        """
        self.state = TrainerState.adopt(self.state)
        max_epochs = check_optional_count(max_epochs, "max_epochs")
        max_iters = check_optional_count(max_iters, "max_iters")
        epoch_length = check_optional_count(epoch_length, "epoch_length")
        if world_size() > 1 and not self.coordinator.is_distributed:
            self.coordinator = RankCoordinator(self)
        status = self._next_status()
        with self.coordinator.attributing_failures(self, is_new=status is not RunStatus.INTERRUPTED):
            if status is RunStatus.RESUMED:
                if prepare_resume(self, data, max_epochs, max_iters):
                    return self.state  # its limit has been reached before
                max_epochs = max_iters = None  # the state has them now
            with self._running(status):
                super().run(data, max_epochs, max_iters, epoch_length)
        self._exit_if_requested()
        self._check_progress(status)
        return self.state

    def _next_status(self) -> RunStatus:
        """What the coming ``run()`` does."""
        if self._internal_run_generator is not None:
            return RunStatus.INTERRUPTED
        if starts_new_run(self):
            self.run_state.take_checkpoint()
        return RunStatus.NEW if self.run_state.checkpoint is None else RunStatus.RESUMED

    @contextmanager
    def _running(self, status: RunStatus) -> Iterator[None]:
        """Begins a run or continues one, and records its status afterwards."""
        if status is RunStatus.NEW:
            warn_of_skipped_batches(self)
            self.state.epoch_is_open = False  # an epoch that an earlier run has cut short is over
        elif status is RunStatus.INTERRUPTED:
            remember_modes(self)
        self.run_state.begin(status)
        try:
            yield
        except BaseException:
            self.run_state.fail()
            raise
        else:
            self.run_state.end(is_interrupted=self._internal_run_generator is not None)

    def _exit_if_requested(self) -> None:
        code, self.exit_code = self.exit_code, None  # if the exit is caught, the next run is an ordinary one
        if code is not None:
            raise SystemExit(code)

    def _check_progress(self, status: RunStatus) -> None:
        """Raises ``RuntimeError`` if a complete run has made no optimizer step."""
        run = self.run_state
        is_complete = (status, run.status) == (RunStatus.NEW, RunStatus.FINISHED) and not run.stop_requested
        if is_complete and self.steps_attempted == run.steps_before:
            raise RuntimeError(
                f"the run ended after {self.state.iteration} iterations without one optimizer step: the data was empty, or "
                "every window was dropped by partial_window='drop'"
            )

    @property
    def steps_attempted(self) -> int:
        """The number of optimizer steps of all phases, made or skipped."""
        return sum(phase.optimizer_step + phase.skipped_steps for phase in self.phases.values())

    @property
    def is_running(self) -> bool:
        """Whether this is called from inside a run."""
        run = self._internal_run_generator
        return run is not None and inspect.getgeneratorstate(run) == inspect.GEN_RUNNING

    def terminate(self, skip_completed: bool = False, reason: str | None = None) -> None:
        """Ends the run after the current event, as Ignite does.

        Args:
            skip_completed: leaves out ``COMPLETED``.
            reason: the text of ``state.stop_reason``.
        """
        self.run_state.stop_requested = True
        reason = reason or f"terminate() was called in epoch {self.state.epoch}, iteration {self.state.iteration}"
        self.coordinator.terminate(self, reason, skip_completed is True)  # as a handler it is given the engine

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """Ends the epoch after the current event, as Ignite does."""
        self.coordinator.terminate_epoch(self, skip_epoch_completed is True)

    def interrupt(self) -> None:
        """Interrupts the run after this iteration, as Ignite does; the next :meth:`run` continues there."""
        self.coordinator.interrupt(self)

    # -- the iteration ------------------------------------------------------------------------------------------------

    def _on_data_end(self) -> None:
        if self.primary.window_is_open:
            completed = self.primary.stop_window(self)
            run_followers(self, completed)

    def batches_left(self, phase: Phase) -> float:
        """The number of batches, the current one included, before a phase's data is sure to end; infinite if unknown."""
        if phase is not self.primary:
            return float("inf")
        state = self.state
        left = float("inf") if state.epoch_length is None else state.epoch_length - self.epoch_iteration + 1
        return left if state.max_iters is None else min(left, state.max_iters - state.iteration + 1)

    @property
    def length_is_known(self) -> bool:
        """Whether the number of batches in an epoch is known."""
        return self.state.epoch_length is not None

    @property
    def window_is_open(self) -> bool:
        """Whether any phase has accumulated gradients that no optimizer step has used yet."""
        return any(phase.window_is_open for phase in self.phases.values())

    def skip_step_if(self, flag: torch.Tensor, then: Callable[[], None] | None = None) -> None:
        """Requests, at ``GRADIENTS_READY`` or ``GRADIENTS_CLIPPED``, that the current optimizer step be skipped.

        Args:
            flag: a boolean scalar tensor on any device; if it is true the step is skipped. All flags are read in one transfer,
                together with the scaler's. With several processes each must call this; one true flag skips the step on all.
            then: called if the flag is true, before ``OPTIMIZER_STEP_SKIPPED``; may raise.
        """
        self.phases[self.state.phase].skip_step_if(flag, then)

    # -- what it consists of ------------------------------------------------------------------------------------------

    def phases_named(self, name: str | None) -> list[Phase]:
        """The phase of this name, or all of them for ``None``.

        Raises:
            ValueError: if there is no such phase.
        """
        if name is None:
            return list(self.phases.values())
        if name not in self.phases:
            raise ValueError(f"phase must be one of {list(self.phases)}, got {name!r}")
        return [self.phases[name]]

    def learning_rates(self, phase: str) -> list[tuple[str, float]]:
        """The current learning rates of a phase by name; with several phases the names begin with that of the phase."""
        rates = group_rates(self.phases[phase].optimizers)
        return [(f"{phase}/{name}", rate) for name, rate in rates] if len(self.phases) > 1 else rates

    def explain(self, *, speed: bool = False) -> str:
        """Describes the cycle as it will run: each event, its handlers in order, their filters and what they change.

        Args:
            speed: adds what would make this run faster, measured on copies, which takes some seconds and changes nothing.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> trainer = Trainer([Phase("model", model, optimizer, lambda engine, batch: model(batch).mean())])
            >>> "BACKWARD_COMPLETED" in trainer.explain()
            True
            >>> "torch.optim.SGD(..., fused=True)" in trainer.explain(speed=True)
            True
        """
        return f"{explain(self)}\n\n{speed_report(self)}" if speed else explain(self)

    def _check_event(self, event_name: Any) -> None:
        self.primary.execution.check_event(event_name)
        for event in event_name if isinstance(event_name, EventsList) else (event_name,):
            if isinstance(event, PhaseEvent):
                self.phases_named(event.phase)  # raises for a misspelled phase

    # -- data ---------------------------------------------------------------------------------------------------------

    def _setup_dataloader_iter(self) -> None:
        checkpoint = self.run_state.take_checkpoint()
        data, state = self.state.dataloader, self.state
        if checkpoint is not None:
            self._unmute(Events.EPOCH_STARTED)
            batches = self.data_position.resume(data, checkpoint["data"], state.iteration)
            if state.epoch_is_open or not checkpoint["data"]["spent"]:
                self._init_iter = self.epoch_iteration if state.epoch_is_open else 0
                self.fetched = self.data_position.taken(state.iteration)
                self._dataloader_iter = self.coordinator.ending_together(batches, self.length_is_known)
                return
        self.data_position.begin(data, state.iteration, state.epoch)
        super()._setup_dataloader_iter()
        self._dataloader_iter = self.coordinator.ending_together(self._dataloader_iter, self.length_is_known)

    def _on_fetch_error(self, error: Exception) -> None:
        if self.coordinator.is_distributed:  # the other ranks have begun the next step and would wait for this one
            raise error
        super()._on_fetch_error(error)

    def _run_once_on_dataset_as_gen(self) -> Generator[State, None, float]:
        self.state.epoch_is_open = True
        elapsed = yield from super()._run_once_on_dataset_as_gen()
        self.state.epoch_is_open = False
        return elapsed

    def _learn_epoch_length(self, length: int) -> None:
        super()._learn_epoch_length(length)
        self.run_state.length_is_learned = self.data_position.is_exhausted = True

    def _warn_of_missing_data(self) -> None:
        """Also ends the run if an epoch would have no batch at all."""
        super()._warn_of_missing_data()
        if self.epoch_iteration == 0 and not self.coordinator.is_distributed and not self._is_done(self.state):
            where = f"the data ended after iteration {self.state.iteration}"
            self.terminate(reason=f"{where}: it can be iterated over only once; give run() a DataLoader or a list")
            raise _EngineTerminateException

    @staticmethod
    def _is_done(state: State) -> bool:
        if not getattr(state, "epoch_is_open", False):
            return Engine._is_done(state)
        is_full = state.epoch_length and state.iteration % state.epoch_length == 0  # a full epoch is completed first
        return state.max_iters is not None and state.iteration >= state.max_iters and not is_full

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self, sharded: bool = False) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain values. With several processes all must call it.

        Args:
            sharded: leaves tensors that FSDP2 has sharded as they are; otherwise they are gathered.

        Returns:
            A dict that ``torch.load(weights_only=True)`` can read, for :meth:`restore`. Its tensors are the live ones.

        Raises:
            TypeError: names anything that a checkpoint can't carry.
        """
        return trainer_state_dict(self, sharded)

    def sharding_reference(self, name: str) -> torch.Tensor | None:
        """The tensor whose sharding a tensor of :meth:`checkpoint` has, by its path there; ``None`` if it is not sharded."""
        _, kind, *path = name.split("/")
        return self.phases[path[0]].sharding_reference("/".join(path[1:])) if kind == "phases" else None

    def restore(self, content: Mapping[str, Any]) -> None:
        """Restores the state in which :meth:`checkpoint` was called; the next :meth:`run` continues from there.

        Args:
            content: the result of :meth:`checkpoint`.

        Raises:
            ValueError: if it belongs to another model or optimizer. After any error the trainer is unchanged.
        """
        self.state = TrainerState.adopt(self.state)
        load_trainer_state(self, content)
