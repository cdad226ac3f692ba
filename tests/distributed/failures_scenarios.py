"""Scenarios in which one rank, or every rank, ends a run by an exception or a signal."""

import gc
import os
import signal
import weakref
from functools import partial
from typing import Any
from unittest import mock

from scenarios import (
    ddp,
    error_of,
    from_rank_zero,
    fsdp,
    full_weights,
    loader,
    max_difference,
    plain_model,
    raise_on_every_rank,
    rank,
    scenario,
    trainer_of,
)

import camshaft.distributed.failures
from camshaft import Events
from camshaft.distributed.failures import Failures


def ignore_sigterm() -> None:
    """Keeps this rank alive: torchrun ends the others as soon as one has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@scenario(2, 3, alone=True)
def exception_on_rank_one() -> dict[str, Any]:
    ignore_sigterm()
    trainer = trainer_of(ddp(plain_model()))

    @trainer.on(Events.ITERATION_STARTED(once=4))
    def fail(engine: Any) -> None:
        if rank() == 1:
            raise ValueError("this batch is spoiled")

    gc.collect()
    gc.disable()  # the trainer must not be part of a reference cycle
    error = error_of(partial(trainer.run, loader(), max_epochs=3))
    reference = weakref.ref(trainer)
    del trainer
    return {"error": error, "is freed": reference() is None}


@scenario(alone=True)
def error_of_rank_one_that_resembles_a_lost_connection() -> str:
    ignore_sigterm()
    trainer = trainer_of(ddp(plain_model()))

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def fail(engine: Any) -> None:
        if rank() == 1:
            raise RuntimeError("the socket of the data server timed out")

    return error_of(lambda: trainer.run(loader()))


@scenario(alone=True)
def rank_one_is_killed() -> dict[str, Any]:
    ignore_sigterm()
    trainer = trainer_of(ddp(plain_model()))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=4), lambda: rank() == 1 and os.kill(os.getpid(), signal.SIGKILL))
    return {"error": error_of(lambda: trainer.run(loader(), max_epochs=3))}


@scenario(alone=True)
def two_failures_in_a_row() -> Any:
    """The first run fails on both ranks, the second one on rank 1."""
    ignore_sigterm()
    trainer, errors = trainer_of(ddp(plain_model())), []
    for text, ranks in (("first", (0, 1)), ("second", (1,))):
        failing = partial(fail_on, ranks, text)
        trainer.add_event_handler(Events.ITERATION_STARTED, failing)
        errors.append(error_of(lambda: trainer.run(loader())))
        trainer.remove_event_handler(failing, Events.ITERATION_STARTED)
        trainer.state.iteration = trainer.state.epoch = 0
    return errors


def fail_on(ranks: Any, text: str) -> None:
    if rank() in ranks:
        raise ValueError(text)


@scenario()
def time_out_without_and_with_a_report() -> Any:
    """Rank 0 finds no report of another rank's failure, and reports its own error; rank 1 finds that report."""
    error = RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete")
    with mock.patch.object(camshaft.distributed.failures, "SECONDS_TO_WAIT", 0.1):
        failures = Failures()
        raised = failures.attribute(error, "in epoch 1") if rank() == 0 else None
        from_rank_zero(None)
        attributed = failures.attribute(error, "in epoch 1") if rank() == 1 else None
    return {"is unchanged": raised is error, "attributed": str(attributed)}


@scenario()
def run_after_an_exception_inside_a_window() -> Any:
    return {"ddp": effect_of_an_exception(ddp), "fsdp": effect_of_an_exception(fsdp)}


def effect_of_an_exception(wrap: Any) -> float:
    """The difference that an earlier run, which failed inside a window on every rank, makes to the weights of a run."""
    weights = []
    for fails in (False, True):
        trainer = trainer_of(wrap(plain_model()), accumulation_steps=4)
        if fails:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=3), raise_on_every_rank)
            error_of(lambda trainer=trainer: trainer.run(loader()))
            trainer.remove_event_handler(raise_on_every_rank, Events.ITERATION_STARTED)
            trainer.state.iteration = trainer.state.epoch = 0
        trainer.run(loader(), max_epochs=2)
        weights.append(full_weights(trainer.primary.module))
    return max_difference(*weights)
