"""Clipping equals torch's, on the unscaled gradient of the window; the norm is the one before clipping."""

import pytest
import torch
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

from camshaft import GradientClipping, StepEvents

MSE = torch.nn.functional.mse_loss


def by_hand(clip, data):
    """A hand-written loop that calls a function between backward and step; returns the model and the results."""
    model = linear()
    optimizer, returned = sgd(model), []
    for x, y in data:
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        returned.append(clip(list(model.parameters())))
        optimizer.step()
    return model, returned


def norms_of(trainer):
    norms = []
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda e: norms.append(e.state.grad_norm))
    return norms


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_clipping_by_norm_equals_torchs(norm_type):
    trainer = trainer_of()
    GradientClipping(0.5, norm_type=norm_type).attach(trainer)
    norms = norms_of(trainer)
    trainer.run(batches(3))
    model, expected = by_hand(lambda p: torch.nn.utils.clip_grad_norm_(p, 0.5, norm_type), batches(3))
    assert same(weights(model_of(trainer)), weights(model))
    assert same(norms, expected)


def test_clipping_by_value_equals_torchs_and_the_norm_is_measured_first():
    trainer = trainer_of()
    GradientClipping(clip_value=0.05).attach(trainer)
    norms = norms_of(trainer)
    trainer.run(batches(3))

    def clip(parameters):
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grad_value_(parameters, 0.05)
        return norm

    model, expected = by_hand(clip, batches(3))
    assert same(weights(model_of(trainer)), weights(model))
    assert same(norms, expected)


def test_norm_then_value():
    trainer = trainer_of(clip_grad_norm=0.5, clip_grad_value=0.1)
    trainer.run(batches(3))

    def clip(parameters):
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        torch.nn.utils.clip_grad_value_(parameters, 0.1)

    assert same(weights(model_of(trainer)), weights(by_hand(clip, batches(3))[0]))


def test_clipping_by_a_function():
    def sign(parameters):
        for parameter in parameters:
            parameter.grad.sign_()

    trainer = trainer_of()
    GradientClipping(function=sign).attach(trainer)
    trainer.run(batches(3))
    assert same(weights(model_of(trainer)), weights(by_hand(sign, batches(3))[0]))


def test_without_a_bound_it_only_measures():
    trainer = trainer_of()
    GradientClipping().attach(trainer)
    norms = norms_of(trainer)
    trainer.run(batches(3))
    model, expected = by_hand(lambda p: torch.nn.utils.get_total_norm([q.grad for q in p]), batches(3))
    assert same(weights(model_of(trainer)), weights(model))
    assert same(norms, expected)


def test_without_the_handler_there_is_no_norm():
    trainer = trainer_of()
    norms = norms_of(trainer)
    trainer.run(batches(2))
    assert norms == [None, None]


def test_with_two_clippings_the_norm_is_the_one_before_both():
    trainer = trainer_of(clip_grad_norm=0.01)
    GradientClipping(clip_value=0.001).attach(trainer, "value")
    norms = norms_of(trainer)
    trainer.run(batches(1))
    _, expected = by_hand(lambda p: torch.nn.utils.get_total_norm([q.grad for q in p]), batches(1))
    assert same(norms, expected)


def test_fp16_is_clipped_after_unscaling():
    trainer = trainer_of(amp="fp16", clip_grad_norm=0.5)
    norms = norms_of(trainer)
    trainer.run(batches(1))
    gradients = torch.cat([p.grad.flatten() for p in model_of(trainer).parameters()])
    assert float(gradients.norm()) == pytest.approx(0.5, rel=1e-4)
    assert 0.5 < float(norms[0]) < 100


def test_the_gradient_of_a_window_is_clipped_once():
    trainer = trainer_of(accumulation_steps=3, clip_grad_norm=0.1)
    norms = norms_of(trainer)
    trainer.run(batches(3))
    model = linear()
    (sum(MSE(model(x), y) for x, y in batches(3)) / 3).backward()
    torch.testing.assert_close(norms[0], torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert len(norms) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_norm": -1}, ValueError, r"clip_grad_norm \(max_norm\) must be a positive number, got -1"),
        ({"max_norm": 0}, ValueError, "must be a positive number, got 0"),
        ({"max_norm": float("nan")}, ValueError, "must be a positive number, got nan"),
        ({"max_norm": True}, ValueError, "must be a positive number, got True"),
        ({"clip_value": "1"}, ValueError, r"clip_grad_value \(clip_value\) must be a positive number, got '1'"),
        ({"norm_type": 0}, ValueError, "norm_type must be a positive number, got 0"),
        ({"function": 3}, TypeError, "function must be callable, got 3"),
        ({"function": print, "max_norm": 1}, ValueError, "can't be combined with max_norm or clip_value"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        GradientClipping(**arguments)
