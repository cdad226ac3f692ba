"""The optimizer step of several accumulated batches equals that of one big batch."""

import pytest
import torch
from ignite.engine import Events
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

from camshaft import GradientAccumulation, StepEvents

MSE = torch.nn.functional.mse_loss
DOUBLE = torch.float64


def ragged():
    """Five batches of different sizes."""
    x, y = batches(1, 20, DOUBLE)[0]
    sizes = [4, 1, 7, 3, 5]
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def double_trainer(**options):
    model = linear(DOUBLE)
    return trainer_of(model, sgd(model), **options)


def big_batch(windows, weighted):
    """One step per window, on the concatenated batches or on the mean of the losses of its batches."""
    model = linear(DOUBLE)
    optimizer = sgd(model)
    for window in windows:
        optimizer.zero_grad()
        if weighted:
            loss = MSE(model(torch.cat([x for x, _ in window])), torch.cat([y for _, y in window]))
        else:
            loss = sum(MSE(model(x), y) for x, y in window) / len(window)
        loss.backward()
        optimizer.step()
    return model


def test_full_windows_equal_the_hand_written_loop_bit_for_bit():
    trainer = trainer_of()
    GradientAccumulation(2).attach(trainer)
    trainer.run(batches(4))
    model = linear()
    optimizer = sgd(model)
    for number, (x, y) in enumerate(batches(4), start=1):
        (MSE(model(x), y) / 2).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert same(weights(model_of(trainer)), weights(model))


@pytest.mark.parametrize("weight", ["batch", "samples", lambda batch: len(batch[0])], ids=["batch", "samples", "callable"])
@pytest.mark.parametrize("policy", ["step", "drop"])
def test_a_window_equals_the_big_batch(weight, policy):
    trainer = double_trainer()
    GradientAccumulation(2, loss_weight=weight, partial_window=policy).attach(trainer)
    trainer.run(ragged())
    data = ragged()
    windows = [data[:2], data[2:4], *([data[4:]] if policy == "step" else [])]
    expected = big_batch(windows, weighted=weight != "batch")
    torch.testing.assert_close(weights(model_of(trainer)), weights(expected), rtol=1e-12, atol=1e-14)


def test_the_loss_in_the_state_is_not_divided():
    trainer, losses = double_trainer(accumulation_steps=2), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=[1, 2]), lambda e: losses.append(e.state.output))
    trainer.run(ragged())
    model = linear(DOUBLE)
    expected = [MSE(model(x), y).detach() for x, y in ragged()[:2]]
    assert [float(loss) for loss in losses] == [float(loss) for loss in expected]


def test_a_change_takes_effect_with_the_next_window():
    trainer, steps = trainer_of(accumulation_steps=2), []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda e: steps.append(e.state.iteration))
    later = GradientAccumulation(3)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: later.attach(e, "later"))
    trainer.run(batches(10))
    assert steps == [2, 4, 7, 10]


def test_detaching_restores_the_window():
    trainer = trainer_of(accumulation_steps=2)
    before = trainer.primary.window.settings
    with GradientAccumulation(5, loss_weight="samples", partial_window="drop").attached(trainer, "other"):
        assert trainer.primary.window.settings == (5, "samples", "drop")
    assert trainer.primary.window.settings == before


def test_a_window_of_weight_zero_is_an_error():
    trainer = trainer_of(loss_weight=lambda batch: 0, accumulation_steps=2)
    with pytest.raises(ValueError, match="every batch of this window weighs 0 by loss_weight"):
        trainer.run(batches(2))


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), None, "3"])
def test_an_invalid_weight_is_an_error_that_names_the_function(weight):
    def tokens(batch):
        return weight

    with pytest.raises(ValueError, match=r"loss_weight \(.*tokens\) must return a finite number of at least 0, got"):
        trainer_of(loss_weight=tokens).run(batches(2))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 0}, "accumulation_steps must be a positive integer, got 0"),
        ({"steps": -1}, "accumulation_steps must be a positive integer, got -1"),
        ({"steps": 1.5}, "accumulation_steps must be a positive integer, got 1.5"),
        ({"steps": True}, "accumulation_steps must be a positive integer, got True"),
        ({"steps": 2, "loss_weight": "token"}, "loss_weight must be 'batch', 'samples' or a function of the batch"),
        ({"steps": 2, "partial_window": "keep"}, "partial_window must be 'step' or 'drop', got 'keep'"),
    ],
)
def test_wrong_arguments_are_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        GradientAccumulation(**arguments)
