"""Accumulation windows during a run: where they end, and when changed settings apply."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from torch.nn.functional import mse_loss
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

from camshaft import (
    GradientAccumulation,
    StepEvents,
)


def steps_of(trainer, data, **limits):
    """The iterations in which the optimizer stepped."""
    made = []
    record = lambda: made.append(trainer.state.iteration)  # noqa: E731
    with trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, record):
        trainer.run(data, **limits)
    return made


@pytest.mark.parametrize(
    ("steps", "partial", "expected"),
    [
        (1, "step", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (2, "step", [2, 4, 5, 7, 9, 10]),
        (2, "drop", [2, 4, 7, 9]),
        (5, "step", [5, 10]),
        (5, "drop", [5, 10]),
        (9, "step", [5, 10]),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_windows_never_cross_the_end_of_an_epoch(steps, partial, expected, known):
    class Stream:
        def __iter__(self):
            return iter(batches(5))

    trainer = trainer_of(accumulation_steps=steps, partial_window=partial)
    assert steps_of(trainer, batches(5) if known else Stream(), max_epochs=2) == expected


def test_a_partial_window_of_a_stream_closes_before_epoch_completed():
    trainer, order = trainer_of(accumulation_steps=2), []
    for event in (StepEvents.OPTIMIZER_STEP_COMPLETED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        trainer.add_event_handler(event, lambda _, name=event.name: order.append(name))
    trainer.run(iter(batches(1)))
    assert order == ["ITERATION_COMPLETED", "OPTIMIZER_STEP_COMPLETED", "EPOCH_COMPLETED"]


def test_a_change_of_settings_applies_to_the_next_window():
    trainer = trainer_of(accumulation_steps=3)
    (first,) = trainer.handlers.values()

    @trainer.on(Events.ITERATION_COMPLETED(once=4))  # inside the second window
    def change():
        first.detach()
        GradientAccumulation(2).attach(trainer)

    assert steps_of(trainer, batches(10)) == [3, 6, 8, 10]


def test_detaching_restores_the_settings():
    trainer = trainer_of(accumulation_steps=3)
    with GradientAccumulation(2).attached(trainer, "for a while"):
        assert steps_of(trainer, batches(4)) == [2, 4]
    assert steps_of(trainer, batches(4), max_epochs=2) == [7, 8]


@pytest.mark.parametrize("event", [StepEvents.FORWARD_STARTED, StepEvents.FORWARD_COMPLETED, StepEvents.BACKWARD_STARTED])
def test_settings_changed_during_the_first_batch_keep_the_gradient_correct(event):
    """Compared with a loop written by hand: each step equals a step on all batches of its window."""
    data = batches(6, dtype=torch.float64)
    model, expected = linear(torch.float64), linear(torch.float64)
    trainer = trainer_of(model)
    weighted = GradientAccumulation(2, loss_weight="samples").attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), weighted.detach)
    trainer.add_event_handler(event(once=4), lambda: weighted.attach(trainer) and None)
    made = steps_of(trainer, data)
    optimizer = sgd(expected)
    for start, end in zip([0, *made], made, strict=False):
        optimizer.zero_grad()
        x, y = (torch.cat(part) for part in zip(*data[start:end], strict=True))
        mse_loss(expected(x), y).backward()
        optimizer.step()
    assert made[:2] == [2, 3]
    assert made[-1] == 6
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-12, atol=1e-12)


def test_parameters_without_a_gradient_keep_none():
    model = linear()
    model.unused = torch.nn.Parameter(torch.ones(2))
    before = model.unused.detach().clone()
    trainer_of(model, accumulation_steps=2, loss_weight="samples").run(batches())
    assert model.unused.grad is None
    assert same([model.unused.detach()], [before])


def gradient_sum(model, data):
    """The gradient of the mean loss over batches, computed by hand."""
    twin = linear()
    twin.load_state_dict(model.state_dict())
    loss = sum(mse_loss(twin(x), y) for x, y in data) / len(data)
    loss.backward()
    return twin.weight.grad


def run_with_early_end(trainer, how):
    """Runs six batches in windows of four, and ends the first window after two batches."""
    ends = {
        "terminate_epoch": lambda: trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate_epoch()),
        "terminate": lambda: trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate()),
    }
    ends.get(how, lambda: None)()
    return trainer.run(batches(6), max_iters=2) if how == "max_iters" else trainer.run(batches(6))


@pytest.mark.parametrize("how", ["terminate_epoch", "max_iters"])
def test_a_window_that_ends_early_steps_on_its_mean_gradient(how):
    trainer, gradients = trainer_of(accumulation_steps=4), []
    model = model_of(trainer)
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: gradients.append(model.weight.grad.clone()))
    expected = gradient_sum(model, batches(6)[:2])
    run_with_early_end(trainer, how)
    assert trainer.state.optimizer_step == 1
    torch.testing.assert_close(gradients[0], expected, rtol=1e-6, atol=1e-7)


def test_terminate_epoch_drops_the_window_if_partial_windows_are_dropped():
    trainer = trainer_of(accumulation_steps=4, partial_window="drop")
    before = weights(model_of(trainer))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate_epoch())
    with pytest.raises(RuntimeError, match="without one optimizer step"):
        trainer.run(batches(6))
    assert same(weights(model_of(trainer)), before)
    assert not trainer.window_is_open


def test_terminate_keeps_the_window_open_without_a_step():
    trainer = trainer_of(accumulation_steps=4)
    before = weights(model_of(trainer))
    assert run_with_early_end(trainer, "terminate").optimizer_step == 0
    assert same(weights(model_of(trainer)), before)
    assert trainer.window_is_open


def test_an_exception_keeps_the_window_open_without_a_step():
    trainer = trainer_of(accumulation_steps=4)
    before = weights(model_of(trainer))

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def fail(engine):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        trainer.run(batches(6))
    assert same(weights(model_of(trainer)), before)
    assert trainer.window_is_open


def test_the_next_run_discards_an_open_window():
    trainer, gradients = trainer_of(accumulation_steps=4), []
    with trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate):
        trainer.run(batches(6))
    model = model_of(trainer)
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(once=1), lambda: gradients.append(model.weight.grad.clone()))
    expected = gradient_sum(model, batches(4))
    trainer.run(batches(4))
    torch.testing.assert_close(gradients[0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("policy", "steps"), [("step", [2, 4, 5]), ("drop", [2, 4])])
def test_partial_window_decides_about_the_last_window_of_an_epoch(policy, steps):
    trainer, seen = trainer_of(accumulation_steps=2, partial_window=policy), []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda e: seen.append(e.state.iteration))
    trainer.run(batches(5))
    assert seen == steps


def test_a_window_ends_with_its_epoch():
    trainer, seen = trainer_of(accumulation_steps=4), []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda e: seen.append(e.state.iteration))
    trainer.run(batches(6), max_epochs=2)
    assert seen == [4, 6, 10, 12]
