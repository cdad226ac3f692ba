"""What Ignite's documentation promises of an engine holds for a trainer and an evaluator."""

import numpy as np
import pytest
from ignite.engine import Engine, Events, State
from toys import batches, evaluator_of, linear, trainer_of

from camshaft import Handler, StepEvents, on


def evaluator():
    return evaluator_of(linear())


def ignites():
    return Engine(lambda engine, batch: 0.0)


ENGINES = pytest.mark.parametrize("make", [ignites, trainer_of, evaluator])


@ENGINES
@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_COMPLETED, Events.ITERATION_STARTED(once=2)])
def test_a_handler_added_to_the_event_that_fires_is_called_in_that_firing(make, event):
    engine, called = make(), []

    def first(engine):
        called.append("first")
        if called == ["first"]:
            engine.add_event_handler(event, lambda: called.append("second"))

    engine.add_event_handler(event, first)
    engine.run(batches(3))
    assert called == ["first", "second"]


def test_a_handler_added_to_a_step_event_that_fires_is_called_in_that_firing():
    trainer, called = trainer_of(), []

    class Late(Handler):
        @on(StepEvents.GRADIENTS_READY)
        def note(self, engine):
            called.append(engine.state.optimizer_step)

    trainer.add_event_handler(StepEvents.GRADIENTS_READY(once=2), lambda engine: Late().attach(engine))
    trainer.run(batches(3))
    assert called == [2, 3]


@ENGINES
def test_a_handler_that_adds_itself_again_and_again_is_called_in_that_firing(make):
    engine, called = make(), []

    def add(engine):
        called.append(len(called))
        if len(called) < 3:
            engine.add_event_handler(Events.STARTED, lambda engine: add(engine))

    engine.add_event_handler(Events.STARTED, add)
    engine.run(batches(2))
    assert called == [0, 1, 2]


@ENGINES
def test_terminate_epoch_as_a_handler_keeps_epoch_completed(make):
    engine, ended = make(), []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: ended.append(engine.state.iteration))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate_epoch())
    if make is not ignites:  # Ignite's own takes the engine for its argument
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), engine.terminate_epoch)
    engine.run(batches(3), max_epochs=3)
    assert ended == [2, 5, 8]


@ENGINES
def test_terminate_epoch_can_leave_epoch_completed_out(make):
    engine, ended = make(), []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: ended.append(1))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate_epoch(True))
    engine.run(batches(3))
    assert ended == []


@ENGINES
def test_a_request_from_the_data_is_honoured_before_the_next_batch(make):
    engine = make()

    def data():
        for number, batch in enumerate(batches(5)):
            if number == 2:
                engine.terminate()
            yield batch

    assert engine.run(data(), epoch_length=5).iteration == 2


@ENGINES
@pytest.mark.parametrize("event", [Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED])
def test_a_request_from_the_events_of_fetching_is_honoured_before_the_batch(make, event):
    engine = make()
    engine.add_event_handler(event(lambda engine, _: engine.state.iteration == 2), lambda engine: engine.terminate())
    assert engine.run(batches(5)).iteration == 2


@ENGINES
def test_a_new_state_can_be_assigned(make):
    engine = make()
    engine.run(batches(3), max_epochs=2)
    engine.state = State()
    assert engine.run(batches(3)).iteration == 3
    engine.state = State(custom=7)
    assert engine.run(batches(2)).custom == 7


def test_a_new_state_starts_the_step_clock_again():
    trainer = trainer_of()
    trainer.run(batches(3), max_epochs=2)
    trainer.state = State()
    assert trainer.run(batches(3)).optimizer_step == 3


def test_the_state_shows_its_metrics():
    trainer = trainer_of()
    trainer.state.metrics["val/accuracy"] = 0.5
    assert "metrics: {'val/accuracy': 0.5}" in repr(trainer.state)


def test_two_equal_handlers_added_while_the_event_fires_are_both_called():
    trainer, called = trainer_of(), []
    note = lambda engine, numbers: called.append(numbers.sum())  # noqa: E731

    def add(engine):
        for _ in range(2):
            engine.add_event_handler(Events.STARTED, note, np.ones(3))

    trainer.add_event_handler(Events.STARTED, add)
    trainer.run(batches(2))
    assert called == [3.0, 3.0]


def test_a_checkpoint_is_restored_into_a_new_state():
    trained, trainer = trainer_of(), trainer_of()
    trained.run(batches(3))
    trainer.state = State()
    trainer.restore(trained.checkpoint())
    assert trainer.state.optimizer_step == 3
