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


def record_events(trainer, *, events=StepEvents, **run):
    log = []
    for event in events:
        trainer.add_event_handler(
            event,
            lambda e, name=event.name: log.append((name, e.state.iteration, e.state.optimizer_step, e.state.skipped_steps)),
        )
    trainer.run(batches(3), **run)
    return log


def two_phases(interval=1):
    """A trainer of two phases, each with a linear model, on the same batches."""
    first, second = linear(), linear()

    def objective(model):
        return lambda engine, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    return Trainer(
        [
            Phase("first", first, sgd(first), objective(first)),
            Phase("second", second, sgd(second), objective(second), interval=interval),
        ]
    )


def test_a_step_fires_events_in_the_order_of_the_enum():
    log = record_events(trainer_of())
    names = [name for name, *_ in log]
    assert names == (ON_ITERATIONS + ON_STEPS) * 3
    assert [event.name for event in StepEvents] == [*ON_ITERATIONS, *ON_STEPS, "OPTIMIZER_STEP_SKIPPED"]


def test_the_step_clock_counts_the_current_step_inside_it_and_completed_steps_elsewhere():
    expected = []
    for iteration in (1, 2, 3):
        expected += [(name, iteration, iteration - 1, 0) for name in ON_ITERATIONS]
        expected += [(name, iteration, iteration, 0) for name in ON_STEPS]
    assert record_events(trainer_of()) == expected


def test_only_the_last_batch_of_a_window_advances_the_step_clock():
    log = record_events(trainer_of(accumulation_steps=2))
    ready = [(iteration, step) for name, iteration, step, _ in log if name == "GRADIENTS_READY"]
    forward = [(iteration, step) for name, iteration, step, _ in log if name == "FORWARD_STARTED"]
    assert ready == [(2, 1), (3, 2)]
    assert forward == [(1, 0), (2, 0), (3, 1)]


def test_the_step_clock_is_decremented_before_step_skipped_fires():
    trainer = trainer_of()
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(event_filter=lambda e, _: e.state.iteration == 2), skip_all)
    log = record_events(trainer)
    assert [entry[1:] for entry in log if entry[0] == "OPTIMIZER_STEP_SKIPPED"] == [(2, 1, 1)]
    assert [entry[1:] for entry in log if entry[0] == "OPTIMIZER_STEP_COMPLETED"] == [(1, 1, 0), (3, 2, 1)]
    assert [entry[1:] for entry in log if entry[0] == "GRADIENTS_READY"] == [(1, 1, 0), (2, 2, 0), (3, 2, 1)]


def test_a_skipped_step_fires_neither_step_started_nor_step_completed():
    trainer = trainer_of()
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, skip_all)
    names = [entry[0] for entry in record_events(trainer)]
    assert names == ([*ON_ITERATIONS, "GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_SKIPPED"]) * 3


def test_ignite_events_see_the_number_of_completed_steps():
    trainer, seen = trainer_of(accumulation_steps=2), []
    for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        trainer.add_event_handler(event, lambda e: seen.append(e.state.optimizer_step))
    trainer.run(batches(4), max_epochs=1)
    assert seen == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_a_partial_window_of_data_without_a_length_closes_before_epoch_completed():
    trainer, log = trainer_of(accumulation_steps=2), []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda e: log.append(("step", e.state.optimizer_step)))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: log.append(("iteration", e.state.iteration)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: log.append(("epoch", e.state.optimizer_step)))
    trainer.run(iter(batches(3)))
    assert log == [("iteration", 1), ("step", 1), ("iteration", 2), ("iteration", 3), ("step", 2), ("epoch", 2)]


def test_the_state_that_each_event_documents_is_set():
    trainer, seen = trainer_of(clip_grad_norm=0.01), {}
    model = model_of(trainer)

    def inspect(engine):
        state, grad = engine.state, model.weight.grad
        seen[engine.last_event_name.name] = {
            "x": state.x is not None,
            "y_pred": state.y_pred is not None,
            "grad": grad is not None,
            "norm": None if state.grad_norm is None else float(state.grad_norm),
            "weight": model.weight.detach().clone(),
        }

    for event in StepEvents:
        trainer.add_event_handler(event, inspect)
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


def test_a_replaced_loss_is_used_for_the_backward_pass_and_the_output():
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
    """The clock values at which a filtered event fires in ``number`` batches. Skips every step if the event needs that."""
    trainer, calls = trainer_of(), []
    if event.name == "OPTIMIZER_STEP_SKIPPED":
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, skip_all)
    trainer.add_event_handler(filtered, lambda e: calls.append(e.clock(event)))
    trainer.run(batches(number))
    return calls


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
def test_every_event_supports_every_filter_on_its_own_clock(name, event):
    terms, expected = FILTERS[name]
    assert clock_values(event, event(**terms)) == expected


@pytest.mark.parametrize("event", StepEvents, ids=lambda event: event.name)
def test_every_event_can_be_combined_with_or(event):
    trainer, calls = trainer_of(), []
    trainer.add_event_handler(event(once=2) | Events.COMPLETED, lambda e: calls.append(e.state.iteration))
    if event is StepEvents.OPTIMIZER_STEP_SKIPPED:
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, skip_all)
    trainer.run(batches(3))
    assert calls == [2, 3]


def test_accumulation_slows_the_step_clock_but_not_the_iteration_clock():
    trainer, calls = trainer_of(accumulation_steps=2), []
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(every=4), lambda e: calls.append(("batch", e.state.iteration)))
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(every=2), lambda e: calls.append(("step", e.state.iteration)))
    trainer.run(batches(8))
    assert calls == [("batch", 4), ("step", 4), ("batch", 8), ("step", 8)]


INVALID_FILTERS = {
    "nothing": ({}, ValueError, "Only one of the input arguments should be specified"),
    "every of zero": ({"every": 0}, ValueError, "should be integer and greater than zero"),
    "two filters": ({"every": 2, "once": 1}, ValueError, "Only one of the input arguments|every and once"),
    "not callable": ({"event_filter": 3}, TypeError, "should be a callable"),
    "phase of a number": ({"phase": 1}, TypeError, "phase must be the name of a phase, got 1"),
}


@pytest.mark.parametrize("name", INVALID_FILTERS)
def test_an_invalid_filter_raises_immediately(name):
    terms, error, text = INVALID_FILTERS[name]
    with pytest.raises(error, match=text):
        StepEvents.GRADIENTS_READY(**terms)


@pytest.mark.parametrize("event", [e for e in StepEvents if "SKIPPED" not in e.name], ids=lambda event: event.name)
def test_a_phase_filter_selects_the_events_of_one_phase(event):
    trainer, calls = two_phases(), []
    trainer.add_event_handler(event(phase="second"), lambda e: calls.append((e.state.phase, e.state.iteration)))
    trainer.run(batches(3))
    assert calls == [("second", 1), ("second", 2), ("second", 3)]


@pytest.mark.parametrize("event", [StepEvents.FORWARD_STARTED, StepEvents.OPTIMIZER_STEP_COMPLETED], ids=lambda e: e.name)
def test_a_phase_filter_counts_on_the_clock_of_that_phase(event):
    trainer, calls = two_phases(interval=2), []
    trainer.add_event_handler(event(phase="second", every=2), lambda e: calls.append(e.state.iteration))
    trainer.add_event_handler(event(phase="first", once=3), lambda e: calls.append(e.state.iteration))
    trainer.run(batches(8))
    assert calls == [3, 4, 8]


def test_without_a_phase_filter_each_phase_counts_on_its_own_clock():
    trainer, calls = two_phases(interval=2), []
    event = StepEvents.OPTIMIZER_STEP_COMPLETED
    trainer.add_event_handler(event(every=2), lambda e: calls.append((e.state.phase, e.state.optimizer_step)))
    trainer.run(batches(4))
    assert calls == [("first", 2), ("first", 4), ("second", 2)]


def test_a_filter_for_an_unknown_phase_raises():
    trainer = trainer_of()
    with pytest.raises(ValueError, match=r"phase must be one of \['model'\], got 'modle'"):
        trainer.on(StepEvents.GRADIENTS_READY(phase="modle"))(print)
