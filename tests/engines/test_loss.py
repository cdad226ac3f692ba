"""The loss and the output of an iteration, and the errors for losses that can't be used."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from toys import batches, collect, linear, names_iteration, same, sgd, trainer_of, weights

from camshaft import (
    Events,
    StepEvents,
    create_trainer,
    freeze,
)


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("loss_weight", ["batch", "samples"])
def test_loss_and_output_are_not_divided_by_the_accumulation_steps(amp, loss_weight):
    model = linear()
    trainer = trainer_of(model, amp=amp, accumulation_steps=4, loss_weight=loss_weight)
    before = collect(trainer, StepEvents.BACKWARD_STARTED, lambda e: e.state.loss.detach())
    after = collect(trainer, StepEvents.BACKWARD_COMPLETED, lambda e: e.state.loss)
    outputs = collect(trainer, Events.ITERATION_COMPLETED, lambda e: e.state.output)
    trainer.run(batches())
    with torch.autocast("cpu", trainer.primary.precision.dtype if amp else torch.bfloat16, enabled=amp is not None):
        expected = [mse_loss(linear()(x), y).detach() for x, y in batches()]
    assert same(before, expected)
    assert same(after, expected)
    assert same(outputs, expected)


def test_the_output_is_detached_and_on_the_device_of_the_model():
    trainer = trainer_of()
    trainer.run(batches(1))
    output = trainer.state.output
    assert (output.requires_grad, output.grad_fn, output.device, output.shape) == (False, None, torch.device("cpu"), ())


def test_a_handler_may_replace_the_loss():
    model = linear()
    trainer = trainer_of(model)

    @trainer.on(StepEvents.FORWARD_COMPLETED)
    def penalise(engine):
        engine.state.loss = engine.state.loss + model.weight.square().sum()

    seen = collect(trainer, Events.ITERATION_COMPLETED, lambda e: e.state.loss)
    trainer.run(batches())
    expected, losses = linear(), []
    optimizer = sgd(expected)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(expected(x), y) + expected.weight.square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert same(weights(model), weights(expected))
    assert same(seen, losses)


BAD_LOSSES = {
    "vector": (lambda y_pred, y: (y_pred - y).square(), ValueError, r"must be a scalar, got a tensor of shape \(4, 2\)"),
    "none": (lambda y_pred, y: None, TypeError, "must be a scalar tensor, got None"),
    "number": (lambda y_pred, y: mse_loss(y_pred, y).item(), TypeError, "must be a scalar tensor, got a float"),
    "tuple": (lambda y_pred, y: (mse_loss(y_pred, y), 1), TypeError, "must be a scalar tensor, got a tuple of 2"),
    "detached": (lambda y_pred, y: mse_loss(y_pred.detach(), y), ValueError, "has no gradient"),
    "mapping without loss": (lambda y_pred, y: {"mse": mse_loss(y_pred, y)}, TypeError, r"without 'loss'; it has \['mse'\]"),
}


def with_a_name(function):
    function.__qualname__ = "users_own"
    return function


@pytest.mark.parametrize("kind", BAD_LOSSES)
@pytest.mark.parametrize("amp", [None, "fp16"])
def test_a_loss_that_cannot_be_differentiated_raises(kind, amp):
    function, error, match = BAD_LOSSES[kind]
    with pytest.raises(error, match=rf"loss_fn users_own\b.*{match}") as caught:
        trainer_of(loss_fn=with_a_name(function), amp=amp, accumulation_steps=2).run(batches())
    assert names_iteration(caught, 1)


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_a_result_of_compute_loss_that_cannot_be_differentiated_raises(kind):
    function, error, match = BAD_LOSSES[kind]
    model = linear()
    objective = with_a_name(lambda model, batch: function(model(batch[0]), batch[1]))
    with pytest.raises(error, match=rf"compute_loss users_own\b.*{match}") as caught:
        create_trainer(model, sgd(model), None, compute_loss=objective).run(batches())
    assert names_iteration(caught, 1)


def test_a_frozen_model_raises():
    model = linear()
    optimizer = sgd(model)
    freeze(model, "*")
    with pytest.raises(ValueError, match="has no gradient.*frozen") as caught:
        trainer_of(model, optimizer).run(batches())
    assert names_iteration(caught, 1)


def test_an_exception_of_the_loss_function_names_the_iteration():
    def loss_fn(y_pred, y):
        if not y.any():
            raise ZeroDivisionError("no labels")
        return mse_loss(y_pred, y)

    with pytest.raises(ZeroDivisionError, match="no labels") as caught:
        trainer_of(loss_fn=loss_fn).run([*batches(2), (torch.zeros(4, 3), torch.zeros(4, 2))])
    assert names_iteration(caught, 3)


@pytest.mark.parametrize("loss_fn", ["mse", None])
def test_a_loss_fn_that_is_not_callable_raises(loss_fn):
    model = linear()
    with pytest.raises(TypeError, match="loss_fn must be callable.*compute_loss"):
        create_trainer(model, sgd(model), loss_fn)


@pytest.mark.parametrize(
    ("argument", "value", "what"),
    [
        ("loss_fn", nn.CrossEntropyLoss, r"a function of \(y_pred, y\), got the class CrossEntropyLoss; make one: CrossEnt"),
        ("model_transform", nn.Sigmoid, r"a function of the model's output, got the class Sigmoid; make one: Sigmoid\(\)"),
    ],
    ids=["loss_fn", "model_transform"],
)
def test_a_class_instead_of_a_function_raises(argument, value, what):
    with pytest.raises(TypeError, match=f"{argument} must be {what}"):
        trainer_of(**{argument: value})


def test_a_class_instead_of_compute_loss_raises():
    class Objective:
        def __call__(self, model, batch):
            return mse_loss(model(batch[0]), batch[1])

    model = linear()
    with pytest.raises(
        TypeError, match=r"compute_loss must be a function of \(model, batch\), got the class Objective; make one"
    ):
        create_trainer(model, sgd(model), None, compute_loss=Objective)
    assert create_trainer(model, sgd(model), None, compute_loss=Objective()).run(batches()).optimizer_step == 3


def test_a_class_can_be_used_as_a_function():
    seen = namedtuple("seen", ["x", "y", "y_pred", "loss"])
    loss_fn = lambda rows, y: mse_loss(torch.stack(rows), y)  # noqa: E731
    state = trainer_of(loss_fn=loss_fn, model_transform=tuple, output_transform=seen).run(batches())
    assert [type(state.output), type(state.output.y_pred)] == [seen, tuple]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("loss_fn", mse_loss),
        ("model_transform", torch.sigmoid),
        ("output_transform", lambda x, y, y_pred, loss: loss),
        ("prepare_batch", lambda batch, device, non_blocking: batch),
    ],
)
def test_compute_loss_with_an_argument_that_it_replaces_raises(argument, value):
    model = linear()
    with pytest.raises(ValueError, match=f"compute_loss .* {argument} can't be used"):
        create_trainer(model, sgd(model), **{"loss_fn": None, "compute_loss": lambda model, batch: 0, argument: value})
