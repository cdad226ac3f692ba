"""The events of a step, their two clocks, and their filters."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from toys import batches, linear, model_of, sgd, trainer_of

from camshaft import (
    Phase,
    StepEvents,
    Trainer,
)

ON_ITERATIONS = ["FORWARD_STARTED", "FORWARD_COMPLETED", "BACKWARD_STARTED", "BACKWARD_COMPLETED"]


ON_STEPS = ["GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_STARTED", "OPTIMIZER_STEP_COMPLETED"]


def skip_all(engine):
    engine.skip_step_if(torch.tensor(True))


def log_of(trainer, *, events=StepEvents, **run):
    log = []
    for event in events:
        trainer.add_event_handler(
            event,
            lambda e, name=event.name: log.append((name, e.state.iteration, e.state.optimizer_step, e.state.skipped_steps)),
        )
    trainer.run(batches(3), **run)
    return log


def two_phases(interval=1):
    """Two linear models that take turns on the same batches."""
    first, second = linear(), linear()

    def objective(model):
        return lambda engine, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    return Trainer(
        [
            Phase("first", first, sgd(first), objective(first)),
            Phase("second", second, sgd(second), objective(second), interval=interval),
        ]
    )


def test_a_step_fires_every_event_in_the_order_of_the_enum():
    log = log_of(trainer_of())
    names = [name for name, *_ in log]
    assert names == (ON_ITERATIONS + ON_STEPS) * 3
    assert [event.name for event in StepEvents] == [*ON_ITERATIONS, *ON_STEPS, "OPTIMIZER_STEP_SKIPPED"]


def test_the_step_clock_is_the_step_being_made_inside_it_and_those_completed_elsewhere():
    expected = []
    for iteration in (1, 2, 3):
        expected += [(name, iteration, iteration - 1, 0) for name in ON_ITERATIONS]
        expected += [(name, iteration, iteration, 0) for name in ON_STEPS]
    assert log_of(trainer_of()) == expected


def test_in_a_window_only_its_last_batch_moves_the_step_clock():
    log = log_of(trainer_of(accumulation_steps=2))
    ready = [(iteration, step) for name, iteration, step, _ in log if name == "GRADIENTS_READY"]
    forward = [(iteration, step) for name, iteration, step, _ in log if name == "FORWARD_STARTED"]
    assert ready == [(2, 1), (3, 2)]
    assert forward == [(1, 0), (2, 0), (3, 1)]


def test_a_skipped_step_gives_its_number_back_before_it_says_so():
    trainer = trainer_of()
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(event_filter=lambda e, _: e.state.iteration == 2), skip_all)
    log = log_of(trainer)
    assert [entry[1:] for entry in log if entry[0] == "OPTIMIZER_STEP_SKIPPED"] == [(2, 1, 1)]
    assert [entry[1:] for entry in log if entry[0] == "OPTIMIZER_STEP_COMPLETED"] == [(1, 1, 0), (3, 2, 1)]
    assert [entry[1:] for entry in log if entry[0] == "GRADIENTS_READY"] == [(1, 1, 0), (2, 2, 0), (3, 2, 1)]


def test_a_skipped_step_fires_neither_start_nor_completion():
    trainer = trainer_of()
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, skip_all)
    names = [entry[0] for entry in log_of(trainer)]
    assert names == ([*ON_ITERATIONS, "GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_SKIPPED"]) * 3


def test_ignites_events_see_the_steps_completed():
    trainer, seen = trainer_of(accumulation_steps=2), []
    for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        trainer.add_event_handler(event, lambda e: seen.append(e.state.optimizer_step))
    trainer.run(batches(4), max_epochs=1)
    assert seen == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_the_partial_window_of_unknown_data_closes_before_epoch_completed():
    trainer, log = trainer_of(accumulation_steps=2), []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda e: log.append(("step", e.state.optimizer_step)))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: log.append(("iteration", e.state.iteration)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: log.append(("epoch", e.state.optimizer_step)))
    trainer.run(iter(batches(3)))
    assert log == [("iteration", 1), ("step", 1), ("iteration", 2), ("iteration", 3), ("step", 2), ("epoch", 2)]


def test_what_each_moment_promises_is_there():
    trainer, seen = trainer_of(clip_grad_norm=0.01), {}
    model = model_of(trainer)

    def look(engine):
        state, grad = engine.state, model.weight.grad
        seen[engine.last_event_name.name] = {
            "x": state.x is not None,
            "y_pred": state.y_pred is not None,
            "grad": grad is not None,
            "norm": None if state.grad_norm is None else float(state.grad_norm),
            "weight": model.weight.detach().clone(),
        }

    for event in StepEvents:
        trainer.add_event_handler(event, look)
    trainer.run(batches(1))
    assert seen["FORWARD_STARTED"]["x"]
    assert seen["FORWARD_COMPLETED"]["y_pred"]
    assert seen["BACKWARD_STARTED"]["grad"] is False
    assert seen["BACKWARD_COMPLETED"]["grad"] is True
    assert seen["GRADIENTS_READY"]["norm"] is None
    assert seen["GRADIENTS_CLIPPED"]["norm"] > 0.01
    assert torch.equal(seen["OPTIMIZER_STEP_STARTED"]["weight"], seen["FORWARD_STARTED"]["weight"])
    assert not torch.equal(seen["OPTIMIZER_STEP_COMPLETED"]["weight"], seen["FORWARD_STARTED"]["weight"])
    assert seen["OPTIMIZER_STEP_COMPLETED"]["grad"] is True


def test_a_replaced_loss_is_the_one_that_goes_backward_and_out():
    trainer = trainer_of()
    model, gradients = model_of(trainer), []

    @trainer.on(StepEvents.FORWARD_COMPLETED)
    def double(engine):
        engine.state.loss = engine.state.loss * 2

    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: gradients.append(model.weight.grad.clone()))
    (x, y) = batches(1)[0]
    twin = linear()
    loss = torch.nn.functional.mse_loss(twin(x), y) * 2
    loss.backward()
    output = trainer.run([(x, y)]).output
    assert torch.equal(gradients[0], twin.weight.grad)
    assert torch.equal(output, loss.detach())


def clock_values(event, filtered, number=6):
    """The values of its clock at which a filtered event was heard, over ``number`` batches; a step is skipped where need be."""
    trainer, heard = trainer_of(), []
    if event.name == "OPTIMIZER_STEP_SKIPPED":
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, skip_all)
    trainer.add_event_handler(filtered, lambda e: heard.append(e.clock(event)))
    trainer.run(batches(number))
    return heard


FILTERS = {
    "every": ({"every": 2}, [2, 4, 6]),
    "every=1": ({"every": 1}, [1, 2, 3, 4, 5, 6]),
    "once": ({"once": 3}, [3]),
    "once of several": ({"once": [1, 5]}, [1, 5]),
    "before": ({"before": 3}, [1, 2]),
    "after": ({"after": 4}, [5, 6]),
    "before and after": ({"before": 5, "after": 2}, [3, 4]),
    "every and after": ({"every": 2, "after": 3}, [4, 6]),
    "callable": ({"event_filter": lambda engine, clock: clock % 3 == 1}, [1, 4]),
}


@pytest.mark.parametrize("event", StepEvents, ids=lambda event: event.name)
@pytest.mark.parametrize("name", FILTERS)
def test_every_event_takes_every_filter_on_its_own_clock(name, event):
    terms, expected = FILTERS[name]
    assert clock_values(event, event(**terms)) == expected


@pytest.mark.parametrize("event", StepEvents, ids=lambda event: event.name)
def test_every_event_joins_with_or(event):
    trainer, heard = trainer_of(), []
    trainer.add_event_handler(event(once=2) | Events.COMPLETED, lambda e: heard.append(e.state.iteration))
    if event is StepEvents.OPTIMIZER_STEP_SKIPPED:
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, skip_all)
    trainer.run(batches(3))
    assert heard == [2, 3]


def test_accumulation_slows_the_step_clock_and_not_the_iterations():
    trainer, heard = trainer_of(accumulation_steps=2), []
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(every=4), lambda e: heard.append(("batch", e.state.iteration)))
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(every=2), lambda e: heard.append(("step", e.state.iteration)))
    trainer.run(batches(8))
    assert heard == [("batch", 4), ("step", 4), ("batch", 8), ("step", 8)]


WRONG = {
    "nothing": ({}, ValueError, "Only one of the input arguments should be specified"),
    "every of zero": ({"every": 0}, ValueError, "should be integer and greater than zero"),
    "two filters": ({"every": 2, "once": 1}, ValueError, "Only one of the input arguments|every and once"),
    "not callable": ({"event_filter": 3}, TypeError, "should be a callable"),
    "phase of a number": ({"phase": 1}, TypeError, "phase must be the name of a phase, got 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_filter_is_an_error_at_once(name):
    terms, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        StepEvents.GRADIENTS_READY(**terms)


@pytest.mark.parametrize("event", [e for e in StepEvents if "SKIPPED" not in e.name], ids=lambda event: event.name)
def test_a_phase_filter_hears_one_network(event):
    trainer, heard = two_phases(), []
    trainer.add_event_handler(event(phase="second"), lambda e: heard.append((e.state.phase, e.state.iteration)))
    trainer.run(batches(3))
    assert heard == [("second", 1), ("second", 2), ("second", 3)]


@pytest.mark.parametrize("event", [StepEvents.FORWARD_STARTED, StepEvents.OPTIMIZER_STEP_COMPLETED], ids=lambda e: e.name)
def test_a_phase_filter_counts_on_that_networks_own_clock(event):
    trainer, heard = two_phases(interval=2), []
    trainer.add_event_handler(event(phase="second", every=2), lambda e: heard.append(e.state.iteration))
    trainer.add_event_handler(event(phase="first", once=3), lambda e: heard.append(e.state.iteration))
    trainer.run(batches(8))
    assert heard == [3, 4, 8]


def test_without_a_phase_filter_both_are_heard_on_the_clock_of_the_one_that_fires():
    trainer, heard = two_phases(interval=2), []
    event = StepEvents.OPTIMIZER_STEP_COMPLETED
    trainer.add_event_handler(event(every=2), lambda e: heard.append((e.state.phase, e.state.optimizer_step)))
    trainer.run(batches(4))
    assert heard == [("first", 2), ("first", 4), ("second", 2)]


def test_a_phase_that_there_is_not():
    trainer = trainer_of()
    with pytest.raises(ValueError, match=r"phase must be one of \['model'\], got 'modle'"):
        trainer.on(StepEvents.GRADIENTS_READY(phase="modle"))(print)
