"""The trainer: an Ignite engine whose iteration is a cycle of named moments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Engine, Events, State
from ignite.engine.engine import _EngineTerminateException
from torch.utils.data import DataLoader

from camshaft.checkpoints.data_position import DataLoaderPosition
from camshaft.checkpoints.metric_state import restore_metrics
from camshaft.checkpoints.trainer_state import prepare_resume, restore, starts_new_run, trainer_state_dict
from camshaft.cudagraphs.checks import check_outside
from camshaft.distributed.collectives import until_rank_zero_is_exhausted, world_size
from camshaft.distributed.coordinator import Coordinator
from camshaft.distributed.failures import Failures
from camshaft.engines.loop import LoopEngine
from camshaft.engines.phase import Phase
from camshaft.engines.state import TrainerState
from camshaft.events import PhaseEvent, StepEvents
from camshaft.handler import Handler
from camshaft.optimizers import group_rates
from camshaft.reports.explain import explain
from camshaft.rng import restore_rng

__all__ = ["Trainer"]


class Trainer(LoopEngine):
    """An Ignite engine that trains one or more phases; made by :func:`create_trainer` and :func:`create_gan_trainer`.

    Whatever works on an ``ignite.engine.Engine`` works on it. An alternating scheme of one's own is a trainer over
    :class:`Phase` objects: the first is led by the data, each other has a whole window after every ``interval``-th
    completed step of the first.

    Args:
        phases: the phases, in order.
        output: called with the trainer after each iteration; gives ``state.output``. By default the detached loss.

    Raises:
        TypeError: where a phase is none.
        ValueError: where two phases have one name, or train the same parameters.

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
        super().__init__(self._step)
        self.state = TrainerState()
        # Ignite's loggers ask this table of the whole process whether an event has a clock; the true ones are the state's
        self.register_events(*StepEvents, event_to_attr=dict.fromkeys(StepEvents, "iteration"))
        self.handlers: dict[str, Handler] = {}
        """The attached handlers of this package, by name."""
        self.unclaimed: dict[str, Any] = {}
        """What a checkpoint had of handlers that aren't attached; one that is before the run goes on from it."""
        self.phases = {phase.name: phase for phase in phases}
        """The phases by name, in order."""
        self.primary, self.followers = phases[0], tuple(phases[1:])
        self._output = output
        self.last_batch: Any = None
        self.data_position = DataLoaderPosition()
        self._restored: Mapping[str, Any] | None = None
        self.length_is_learned = False
        self.stop_requested = False
        self._steps_before = 0
        self.coordinator: Coordinator | None = None
        """The other processes of this run; ``None`` where there is one."""
        self.exit_code: int | None = None
        """What the process exits with when the run has ended; set by whoever was asked to end it."""
        self.add_event_handler_at(-1000, Events.STARTED, self._begin_run)
        self.add_event_handler_at(1000, Events.STARTED, self._begin_data)
        self.add_event_handler_at(-1000, Events.EPOCH_STARTED, self._begin_epoch)
        self.add_event_handler_at(1000, Events.EPOCH_STARTED, self._remember_modes)
        self.add_event_handler_at(-1000, Events.EPOCH_COMPLETED, self._remember_modes)  # before a user's model.eval()

    # -- the step -----------------------------------------------------------------------------------------------------

    def _step(self, engine: Engine, batch: Any) -> Any:
        primary = self.primary
        if primary.frozen:
            with primary.frozen_modules():
                completed = primary.run(self, batch)
        else:
            completed = primary.run(self, batch)
        if self.followers:
            self.last_batch = batch
            self._follow(completed)
        return self.state.loss if self._output is None else self._output(self)

    def _follow(self, completed: bool) -> None:
        """Gives the other phases their turn after a completed step of the first."""
        for phase in self.followers:
            if completed and self.primary.optimizer_step % phase.interval == 0:
                phase.run_window(self, self.last_batch)
        main = self.followers[-1]  # between iterations the clock is that of the last phase
        self.state.optimizer_step, self.state.skipped_steps = main.optimizer_step, main.skipped_steps

    def _data_stopped(self) -> None:
        if self.primary.window_is_open:
            completed = self.primary.stop_window(self)
            if self.followers:
                self._follow(completed)

    @property
    def batches_left(self) -> float:
        """How many batches there are, this one included, before the data is bound to stop; infinite where not known."""
        state = self.state
        left = float("inf") if state.epoch_length is None else state.epoch_length - self.epoch_iteration + 1
        return left if state.max_iters is None else min(left, state.max_iters - state.iteration + 1)

    @property
    def length_is_known(self) -> bool:
        """Whether it is sure how many batches there are before the data stops."""
        return self.state.epoch_length is not None

    @property
    def window_is_open(self) -> bool:
        """Whether any phase has gathered gradients that no optimizer step has used yet."""
        return any(phase.window_is_open for phase in self.phases.values())

    def _check_event(self, event_name: Any) -> None:
        """Raises where nobody can listen to an event: inside a CUDA graph."""
        if self.primary.capture is not None:
            check_outside(event_name)

    def _handler_wrapper(self, handler: Callable[..., Any], event_name: Any, event_filter: Any) -> Callable[..., Any]:
        if isinstance(event_name, PhaseEvent):
            self.phases_named(event_name.phase)  # a misspelt phase would never be heard
        return super()._handler_wrapper(handler, event_name, event_filter)

    @property
    def is_running(self) -> bool:
        """Whether a run is under way, so that this is asked from inside it."""
        generator = self._internal_run_generator
        return generator is not None and inspect.getgeneratorstate(generator) == inspect.GEN_RUNNING

    def skip_step_if(self, flag: torch.Tensor, then: Callable[[], None] = lambda: None) -> None:
        """Asks at ``GRADIENTS_READY`` or ``GRADIENTS_CLIPPED`` that the coming optimizer step be refused.

        Args:
            flag: a boolean scalar tensor on any device; the step is refused where it is true. The flags of all handlers and
                of the scaler are fetched in one transfer. Of several processes each must ask; one true flag refuses for all.
            then: called where it is true, before ``OPTIMIZER_STEP_SKIPPED``; may raise.

        Example:
            >>> def skip_spikes(engine):
            ...     engine.skip_step_if(engine.state.grad_norm > 100)
        """
        self.phases[self.state.phase].skip_step_if(flag, then)

    def phases_named(self, name: str | None) -> list[Phase]:
        """The phase of this name, or all of them for ``None``.

        Raises:
            ValueError: where there is no such phase.
        """
        if name is None:
            return list(self.phases.values())
        if name not in self.phases:
            raise ValueError(f"phase must be one of {list(self.phases)}, got {name!r}")
        return [self.phases[name]]

    def learning_rates(self, phase: str) -> list[tuple[str, float]]:
        """The present learning rates of a phase by name; with several phases the names begin with the phase's."""
        rates = group_rates(self.phases[phase].optimizers)
        return [(f"{phase}/{name}", rate) for name, rate in rates] if len(self.phases) > 1 else rates

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
            data: batches that can be passed over again and again (a list or a ``DataLoader``).
            max_epochs: the epoch after which the run ends (default 1); a resumed run counts on from where it was.
            max_iters: the iteration after which it ends, instead.
            epoch_length: the number of batches that count as an epoch, by default all of ``data``.

        Returns:
            The trainer's state.

        Raises:
            RuntimeError: where the run ends without one optimizer step made or skipped.
            ValueError: where a number is out of range, or the data isn't that of the checkpoint.
        """
        for name, value in (("max_epochs", max_epochs), ("max_iters", max_iters), ("epoch_length", epoch_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if world_size() > 1 and self.coordinator is None:
            self.coordinator = Coordinator(self)
        limits = max_epochs, max_iters
        with self._attributing_failures():
            goes_on = self._internal_run_generator is not None  # interrupted: inside the same epoch
            if not goes_on and starts_new_run(self):
                self._restored = None
            resumed = self._restored is not None and not goes_on
            if resumed:
                if prepare_resume(self, self._restored, data, *limits):  # type: ignore[arg-type]
                    return self.state
                limits = None, None
            elif not goes_on:
                self.state.epoch_is_open = False  # an earlier run's last epoch, cut short, is over all the same
            self.stop_requested = self.stop_requested and goes_on
            for phase in self.phases.values() if goes_on else ():
                phase.remember_modes()
            super().run(data, *limits, epoch_length)
        ended = self._internal_run_generator is None
        self._exit_if_asked()
        if ended and not resumed and not goes_on and not self.stop_requested and self._steps_tried() == self._steps_before:
            raise RuntimeError(
                f"the run ended after {self.state.iteration} iterations without one optimizer step: the data was empty, or "
                "every window was dropped by partial_window='drop'"
            )
        return self.state

    @contextmanager
    def _attributing_failures(self) -> Iterator[None]:
        """Where other processes run too, an exception that comes of one's failure names that one."""
        if self.coordinator is None:
            yield
            return
        if self._internal_run_generator is None:
            self.coordinator.failures = Failures()
        try:
            yield
        except BaseException as error:
            cause = self.coordinator.failures.leave(error, f"in epoch {self.state.epoch}, iteration {self.state.iteration}")
            if cause is error:
                raise
            raise cause from error
        finally:
            self.coordinator.leave()

    def _exit_if_asked(self) -> None:
        code, self.exit_code = self.exit_code, None  # where the exit is caught, the next run is an ordinary one
        if code is not None:
            raise SystemExit(code)

    def terminate(self, skip_completed: bool = False, reason: str | None = None) -> None:
        """Ends the run after the event in which this is called, as Ignite does.

        Args:
            skip_completed: leaves out ``COMPLETED``.
            reason: what ``state.stop_reason`` says.
        """
        self.stop_requested = True
        where = f"epoch {self.state.epoch}, iteration {self.state.iteration}"
        reason = reason or f"terminate() was called in {where}"
        skip_completed = skip_completed is True  # as a handler itself it is given the engine
        if self.coordinator is not None and self.is_running:
            self.coordinator.ask_to_stop(reason, skip_completed)
            return
        super().terminate(skip_completed)
        if self.state.stop_reason is None:
            self.state.stop_reason = reason

    def terminate_epoch(self, *arguments: Any, **keywords: Any) -> None:
        """Ends the epoch after the event in which this is called, as Ignite does."""
        if self.coordinator is not None and self.is_running:
            self.coordinator.epoch_end_requested = True
            return
        super().terminate_epoch(*arguments, **keywords)

    def interrupt(self) -> None:
        """Holds the run up after the present iteration, as Ignite does; the next :meth:`run` goes on there."""
        if self.coordinator is not None and self.is_running:
            self.coordinator.interrupt_requested = True
            return
        super().interrupt()

    def explain(self, *, speed: bool = False) -> str:
        """The cycle as it will run, as text: each event, its handlers in order, their filters and what they change.

        Args:
            speed: adds what would make this run faster, in the words to type, with the gain where some steps on copies can
                measure it; takes some seconds and changes nothing of the run. What it says of data it knows from
                the first run on.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> trainer = Trainer([Phase("model", model, optimizer, lambda engine, batch: model(batch).mean())])
            >>> "BACKWARD_COMPLETED" in trainer.explain()
            True
            >>> "torch.optim.SGD(..., fused=True)" in trainer.explain(speed=True)
            True
        """
        if not speed:
            return explain(self)
        from camshaft.reports.speed import speed_report  # here, because few ask for it

        return f"{explain(self)}\n\n{speed_report(self)}"

    def _steps_tried(self) -> int:
        return sum(phase.optimizer_step + phase.skipped_steps for phase in self.phases.values())

    def _begin_run(self) -> None:
        """First of all at ``STARTED``: a new run begins its clocks anew, a resumed one keeps them."""
        state = self.state
        state.stop_reason = None
        self.unclaimed = {}
        state.phase = self.primary.name
        for phase in self.phases.values():
            phase.remember_modes()
            if self._restored is None and state.iteration == 0:
                phase.optimizer_step = phase.skipped_steps = phase.forward_passes = 0
                state.losses.clear()
        if self.coordinator is not None:
            self.coordinator.begin()
        self._steps_before = self._steps_tried()
        main = list(self.phases.values())[-1]
        state.optimizer_step, state.skipped_steps = main.optimizer_step, main.skipped_steps

    def _begin_epoch(self) -> None:
        """First of all at ``EPOCH_STARTED``: what an earlier run left in the middle of a window is thrown away."""
        for phase in self.phases.values():
            if phase.window_is_open:
                phase.abandon_window()

    def _remember_modes(self) -> None:
        """Last of all at ``EPOCH_STARTED``: what a user has put in eval mode there stays there."""
        for phase in self.phases.values():
            phase.remember_modes()

    def _begin_data(self) -> None:
        """Last of all at ``STARTED``: a resumed run has its random state again, and an epoch begun isn't begun twice."""
        if self._restored is None:
            return
        restore_metrics(self, self._restored["epoch_metrics"], self.state.epoch_is_open)
        restore_rng(self._restored["rng"])
        if self.state.epoch_is_open:
            self._listeners["EPOCH_STARTED"] = ()  # until the data is set up, which follows at once

    def _setup_dataloader_iter(self) -> None:
        restored, self._restored = self._restored, None
        data = self.state.dataloader
        if restored is not None:
            self._listeners.pop("EPOCH_STARTED", None)
            if self.state.epoch_is_open or not restored["data"]["spent"]:
                self._init_iter = self.epoch_iteration if self.state.epoch_is_open else 0
                self._dataloader_iter = self._passed_together(
                    self.data_position.resume(data, restored["data"], self.state.iteration)
                )
                return
            self.data_position.resume(data, restored["data"], self.state.iteration)
        self.data_position.begin(data, self.state.iteration, self.state.epoch)
        super()._setup_dataloader_iter()
        self._dataloader_iter = self._passed_together(self._dataloader_iter)

    def _passed_together(self, batches: Any) -> Any:
        """Batches that end on every process at once, where nobody knows how many there are."""
        return (
            until_rank_zero_is_exhausted(batches)
            if self.coordinator is not None and self.state.epoch_length is None
            else batches
        )

    def _on_fetch_error(self, error: Exception) -> None:
        if self.coordinator is not None:  # the others have begun the next step and would wait for this one
            raise error
        super()._on_fetch_error(error)

    def _run_once_on_dataset_as_gen(self) -> Generator[State, None, float]:
        self.state.epoch_is_open = True
        elapsed = yield from super()._run_once_on_dataset_as_gen()
        self.state.epoch_is_open = False
        return elapsed

    def _learn_epoch_length(self, length: int) -> None:
        super()._learn_epoch_length(length)
        self.length_is_learned = self.data_position.is_exhausted = True

    def _warn_of_missing_data(self) -> None:
        """Ends the run, as well, where an epoch would have no batch at all."""
        super()._warn_of_missing_data()
        if self.epoch_iteration == 0 and self.coordinator is None and not self._is_done(self.state):
            reason = f"the data gave out after iteration {self.state.iteration}"
            self.terminate(reason=f"{reason}: it can be passed over only once; give run() a DataLoader or a list")
            raise _EngineTerminateException

    @staticmethod
    def _is_done(state: State) -> bool:
        if not getattr(state, "epoch_is_open", False):
            return Engine._is_done(state)
        reached = state.max_iters is not None and state.iteration >= state.max_iters
        return reached and not (
            state.epoch_length and state.iteration % state.epoch_length == 0
        )  # that epoch is to be completed

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self, sharded: bool = False) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain values. Of several processes all must call it.

        Args:
            sharded: leaves tensors that FSDP2 has split over the processes as they are; otherwise they are brought together.

        Returns:
            A dict that ``torch.load(weights_only=True)`` can read back, for :meth:`restore`. Its tensors are the live ones.

        Raises:
            TypeError: names whatever a checkpoint can't carry.
        """
        return trainer_state_dict(self, sharded)

    def sharding_reference(self, name: str) -> torch.Tensor | None:
        """What a tensor of :meth:`checkpoint` is sharded as here, by its place there; ``None`` for one that is whole."""
        _, kind, *place = name.split("/")
        return self.phases[place[0]].sharding_reference("/".join(place[1:])) if kind == "phases" else None

    def restore(self, content: Mapping[str, Any]) -> None:
        """Sets everything back to where :meth:`checkpoint` was called; the next :meth:`run` goes on from there.

        Args:
            content: what :meth:`checkpoint` gave.

        Raises:
            ValueError: where it belongs to another model, optimizer or scheme; nothing has been changed then.
        """
        restore(self, content)


def check_phases(phases: Sequence[Phase]) -> None:
    """Raises where the phases can't make a trainer."""
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise TypeError(f"phases must be a sequence of at least one Phase, got {phases!r}")
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise ValueError(f"every phase needs a name of its own, got {names}")
    if any(phase.device.type == "meta" for phase in phases):
        raise ValueError(
            "the model is on 'meta', where parameters have no values: nothing would be trained. Call "
            "model.to_empty(device=...) and load or initialise its weights before you make the optimizer"
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
