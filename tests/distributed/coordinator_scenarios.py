"""Scenarios in which one rank requests something, or has another plan than the others."""

import os
import signal
from contextlib import contextmanager
from typing import Any

from ignite.engine import Engine
from scenarios import (
    OUTPUT,
    ddp,
    error_of,
    full_weights,
    have_equal_weights,
    is_last_rank,
    loader,
    plain_model,
    rank,
    scenario,
    trainer_of,
)
from torch.nn.parallel import DistributedDataParallel

from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Events,
    FreezeParameters,
    LRHistory,
    NonFiniteGuard,
    StopOnSignal,
    TimeLimit,
)
from camshaft.cudagraphs.wrap import CudaGraphExecution
from camshaft.engines.execution import EagerExecution


def fill_with_nan(engine: Any) -> None:
    engine.state.batch[0].fill_(float("nan"))


# -- requests of one rank -------------------------------------------------------------------------------------------------


@scenario(2, 3)
def terminated_by_one_rank() -> Any:
    model = ddp(plain_model())
    trainer = trainer_of(model)
    if is_last_rank():
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda e: e.terminate(reason="enough"))
    state = trainer.run(loader(), max_epochs=3)
    return {"iteration": state.iteration, "reason": state.stop_reason, **full_weights(model)}


@scenario(2, 3)
def terminated_at_the_start_by_one_rank() -> Any:
    trainer = trainer_of(ddp(plain_model()))
    if is_last_rank():
        trainer.add_event_handler(Events.STARTED, lambda e: e.terminate(reason="not today"))
    state = trainer.run(loader())
    return {"iteration": state.iteration, "epoch": state.epoch}


@scenario()
def epoch_ended_without_epoch_completed_by_one_rank() -> dict[str, Any]:
    trainer, completed = trainer_of(ddp(plain_model())), []
    if is_last_rank():
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: e.terminate_epoch(skip_epoch_completed=True))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: completed.append(e.state.epoch))
    state = trainer.run(loader(), max_epochs=2)
    return {"iteration": state.iteration, "completed": completed}


@scenario(2, 3)
def interrupted_by_one_rank() -> Any:
    trainer = trainer_of(ddp(plain_model()))
    if is_last_rank():
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), trainer.interrupt)
    with interruption_enabled():
        trainer.run(loader(), max_epochs=2)
        interrupted_at = trainer.state.iteration
        trainer.run(loader(), max_epochs=2)
    return {"interrupted at": interrupted_at, "iteration": trainer.state.iteration}


@contextmanager
def interruption_enabled() -> Any:
    before, Engine.interrupt_resume_enabled = Engine.interrupt_resume_enabled, True
    try:
        yield
    finally:
        Engine.interrupt_resume_enabled = before


@scenario(2, 3)
def early_stopping_on_one_rank() -> dict[str, Any]:
    """The metric differs between ranks: it improves on all ranks but rank 0."""
    trainer = trainer_of(ddp(plain_model()))
    EarlyStopping("score", patience=2).attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=float(e.state.epoch * (-1 if rank() == 0 else 1)))
    )
    state = trainer.run(loader(), max_epochs=6)
    return {"epoch": state.epoch, "reason": state.stop_reason}


@scenario(2, 3)
def time_limit_on_one_rank() -> dict[str, Any]:
    trainer = trainer_of(ddp(plain_model()), accumulation_steps=2)
    limit = TimeLimit(1).attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def exceed(engine: Any) -> None:
        limit.hours = 1e-9 if is_last_rank() else 1

    state = trainer.run(loader(), max_epochs=3)
    return {"iteration": state.iteration, "steps": state.optimizer_step}


@scenario()
def signal_to_one_rank() -> dict[str, Any]:
    trainer = trainer_of(ddp(plain_model()), accumulation_steps=3)
    CheckpointRotation(OUTPUT / "signal", keep_last=1).attach(trainer)
    StopOnSignal().attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=4), lambda: rank() == 1 and os.kill(os.getpid(), signal.SIGTERM))
    code = None
    try:
        trainer.run(loader(), max_epochs=3)
    except SystemExit as end:
        code = end.code
    state = trainer.state
    return {"code": code, "iteration": state.iteration, "steps": state.optimizer_step, "reason": state.stop_reason}


# -- a loss that is not finite on one rank --------------------------------------------------------------------------------


@scenario(2, 3)
def step_skipped_by_one_rank() -> Any:
    model = ddp(plain_model())
    trainer = trainer_of(model)
    NonFiniteGuard("skip").attach(trainer)
    if is_last_rank():
        trainer.add_event_handler(Events.ITERATION_STARTED(once=3), fill_with_nan)
    state = trainer.run(loader(), max_epochs=1)
    return {"steps": state.optimizer_step, "skipped": state.skipped_steps, **full_weights(model)}


@scenario(2, 3)
def guard_that_raises_on_rank_zero() -> str:
    trainer = trainer_of(ddp(plain_model()))
    NonFiniteGuard("raise").attach(trainer)
    if rank() == 0:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=3), fill_with_nan)
    return error_of(lambda: trainer.run(loader())) + f" after {trainer.state.optimizer_step}"


# -- plans that cannot be carried out -------------------------------------------------------------------------------------


@scenario()
def different_numbers_of_batches() -> str:
    return error_of(lambda: trainer_of(ddp(plain_model())).run(list(loader())[: 5 + rank()]))


@scenario()
def a_handler_on_rank_zero_alone() -> str:
    trainer = trainer_of(ddp(plain_model()))
    if rank() == 0:
        LRHistory().attach(trainer)
    return error_of(lambda: trainer.run(loader()))


@scenario()
def frozen_parameters_under_ddp() -> Any:
    """An error with DDP's defaults. With a search for unused parameters, the frozen ones are trained from epoch 2 on."""
    trainer = trainer_of(ddp(plain_model()))
    error = error_of(lambda: FreezeParameters("0.*", until_epoch=2).attach(trainer))
    model = DistributedDataParallel(plain_model(), find_unused_parameters=True)
    trainer = trainer_of(model)
    FreezeParameters("0.*", until_epoch=2).attach(trainer)
    are_trained = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def compare() -> None:
        are_trained.append(not have_equal_weights(model.module[0], plain_model()[0]))

    trainer.run(loader(), max_epochs=2)
    return {"error": error, "are trained": are_trained}


class CudaGraphsWithoutDevice(EagerExecution):
    """Execution with ``capture=True``, on a device that has no CUDA graphs."""

    check_distributed = CudaGraphExecution.check_distributed  # type: ignore[assignment]


@scenario()
def cuda_graphs_on_several_ranks() -> Any:
    trainer = trainer_of(ddp(plain_model()))
    trainer.primary.execution = CudaGraphsWithoutDevice()
    return error_of(lambda: trainer.run(loader()))
