"""The accumulation window: how each loss is scaled, and when changed settings apply."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ignite.engine import Events
from torch.nn.functional import mse_loss
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

from camshaft import (
    GradientAccumulation,
    StepEvents,
)
from camshaft.engines.window import Window

INFINITE = float("inf")


def window_of(steps, loss_weight="batch", partial="step", left=INFINITE):
    window = Window()
    window.configure(steps, loss_weight, partial)
    window.limit(left)
    return window


def scale_losses(window, losses, data):
    """Adds batches to a window as the step does. Returns the scaled losses."""
    scaled = []
    for loss, batch in zip(losses, data, strict=True):
        weight = window.batch_weight(batch)
        scaled.append(float(window.scale_loss(torch.tensor(loss, dtype=torch.float64), weight)))
        window.count(weight)
    return scaled


def batch_of(size):
    return torch.zeros(size, 2), torch.zeros(size)


@pytest.mark.parametrize(
    ("steps", "partial", "left", "length"),
    [
        (4, "step", INFINITE, 4),
        (4, "step", 9, 4),
        (4, "step", 4, 4),
        (4, "step", 3, 3),
        (4, "step", 1, 1),
        (4, "drop", 3, 4),
        (4, "drop", 4, 4),
        (1, "step", 1, 1),
    ],
)
def test_the_length_of_a_new_window(steps, partial, left, length):
    assert window_of(steps, partial=partial, left=left).length == length


def test_each_loss_of_a_full_window_is_scaled_to_the_mean():
    window = window_of(4)
    assert scale_losses(window, [4.0, 8.0, 2.0, 6.0], [None] * 4) == [1.0, 2.0, 0.5, 1.5]
    assert window.divisor() is None


def test_each_loss_of_a_shorter_window_is_scaled_to_its_mean():
    window = window_of(4, left=2)
    assert scale_losses(window, [4.0, 8.0], [None] * 2) == [2.0, 4.0]
    assert window.divisor() is None


def test_gradients_of_a_window_that_ends_early_are_divided_by_its_missing_part():
    window = window_of(4)
    scaled = scale_losses(window, [4.0, 8.0, 2.0], [None] * 3)
    assert window.divisor() == 0.75
    assert sum(scaled) / window.divisor() == pytest.approx((4 + 8 + 2) / 3, abs=1e-15)


def test_losses_are_weighted_by_the_number_of_samples():
    window = window_of(3, "samples")
    scaled = scale_losses(window, [4.0, 8.0, 2.0], [batch_of(1), batch_of(5), batch_of(2)])
    assert scaled == [4.0, 40.0, 4.0]
    assert (window.weight, window.divisor()) == (8, 8)


def test_losses_are_weighted_by_a_custom_function():
    window = window_of(2, lambda batch: batch["tokens"])
    assert scale_losses(window, [4.0, 8.0], [{"tokens": 3}, {"tokens": 0.5}]) == [12.0, 4.0]
    assert window.divisor() == 3.5


@pytest.mark.parametrize("left", [INFINITE, 2])
def test_a_weighted_window_that_ends_early_needs_no_correction(left):
    window = window_of(4, "samples", left=left)
    scale_losses(window, [4.0, 8.0], [batch_of(1), batch_of(5)])
    assert window.divisor() == 6


def test_the_gradient_of_a_single_weighted_batch_is_unchanged():
    window = window_of(1, "samples")
    (scaled,) = scale_losses(window, [3.0], [batch_of(7)])
    assert scaled / window.divisor() == 3.0


def test_the_loss_of_a_window_of_one_batch_is_not_scaled():
    loss = torch.tensor(3.0)
    assert window_of(1).scale_loss(loss, None) is loss


@dataclass
class Sentences:
    lengths: list
    tokens: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(5, 2), 5),
        (batch_of(3), 3),
        ([batch_of(3), batch_of(4)], 3),
        ({"name": "a", "x": torch.zeros(6)}, 6),
        (Sentences([2, 3], torch.zeros(2, 3)), 2),
        ((torch.tensor(1.0), torch.zeros(4, 1)), 4),  # a scalar has no length
        ((None, {"y": [torch.zeros(8)]}), 8),
    ],
    ids=["tensor", "pair", "nested", "dict", "dataclass", "scalar first", "none first"],
)
def test_the_number_of_samples_is_the_length_of_the_first_tensor(batch, samples):
    assert window_of(2, "samples").batch_weight(batch) == samples


@pytest.mark.parametrize("batch", [None, ("a", "b"), torch.tensor(1.0), {}])
def test_a_batch_without_samples_raises(batch):
    with pytest.raises(TypeError, match="loss_weight='samples' needs a tensor with a length"):
        window_of(2, "samples").batch_weight(batch)


@pytest.mark.parametrize("weight", [3, 2.5, 0, torch.tensor(4), torch.tensor([4.0])])
def test_a_weight_is_converted_to_a_number_on_the_host(weight):
    result = window_of(2, lambda batch: weight).batch_weight(None)
    assert result == float(weight)
    assert isinstance(result, (int, float))


@pytest.mark.parametrize("weight", [-1, INFINITE, float("nan"), None, "3", torch.ones(2), torch.tensor(-1.0)])
def test_an_invalid_weight_raises(weight):
    def tokens(batch):
        return weight

    with pytest.raises(ValueError, match=r"loss_weight \(.*tokens\) must return a finite number of at least 0"):
        window_of(2, tokens).batch_weight(None)


def test_a_window_of_weight_zero_raises():
    window = window_of(2, lambda batch: 0)
    scale_losses(window, [4.0, 8.0], [None, None])
    with pytest.raises(ValueError, match="weighs 0"):
        window.divisor()


def test_an_open_window_keeps_its_settings():
    window = window_of(4)
    scale_losses(window, [4.0], [None])
    window.configure(2, "samples")
    assert (window.length, window.steps, window.settings[0]) == (4, 4, 2)
    assert scale_losses(window, [8.0], [batch_of(3)]) == [2.0]
    window.reset()
    window.limit(INFINITE)
    assert (window.length, window.loss_weight) == (2, "samples")


def test_weights_are_cleared_after_each_window():
    window = window_of(2, "samples")
    scale_losses(window, [4.0, 8.0], [batch_of(1), batch_of(5)])
    window.reset()
    assert (window.batches, window.weight) == (0, 0.0)


def test_the_state_of_an_open_window_is_restored():
    before, after = window_of(4, "samples"), window_of(4, "samples")
    scale_losses(before, [4.0, 8.0], [batch_of(1), batch_of(5)])
    after.load_state_dict(before.state_dict())
    for window in (before, after):
        scale_losses(window, [2.0, 1.0], [batch_of(2), batch_of(3)])
    assert (after.batches, after.divisor()) == (before.batches, before.divisor()) == (4, 11)


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
