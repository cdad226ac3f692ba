"""Models, optimizers and schedulers that `create_trainer` rejects."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from toys import linear, sgd, trainer_of

from camshaft import (
    LRScheduling,
    create_evaluator,
    create_trainer,
)


@pytest.mark.parametrize("create", [lambda model: create_trainer(model, sgd(linear()), mse_loss), create_evaluator])
@pytest.mark.parametrize(
    ("model", "what"),
    [("resnet", "str"), (None, "NoneType"), (nn.Linear, r"the class Linear; make one: Linear\(\.\.\.\)")],
    ids=["text", "none", "class"],
)
def test_a_model_that_is_not_a_module_raises(model, what, create):
    with pytest.raises(TypeError, match=rf"must be a torch\.nn\.Module, got {what}"):
        create(model)


def test_an_optimizer_of_another_model_raises():
    with pytest.raises(ValueError, match="optimizer SGD .* holds no parameter of the model"):
        trainer_of(linear(), sgd(linear()))


def test_one_optimizer_of_another_model_among_several_raises():
    model = linear()
    with pytest.raises(ValueError, match="optimizer Adam .* holds no parameter of the model"):
        trainer_of(model, [sgd(model), torch.optim.Adam(linear().parameters())])


def test_an_optimizer_created_before_the_model_was_copied_raises():
    model = linear()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"holds no parameter of the model.*model\.parameters\(\)"):
        trainer_of(copy.deepcopy(model), optimizer)


def test_parameters_without_an_optimizer_give_a_warning(caplog):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = sgd(model)
    model[1] = nn.Linear(2, 2)  # after the optimizer was made
    trainer_of(model, optimizer)
    assert "2 parameters of phase 'model' require gradients but are in no optimizer" in caplog.text
    assert "1.weight, 1.bias" in caplog.text


def test_frozen_parameters_need_no_optimizer(caplog):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    trainer_of(model, sgd(model[0]))
    assert caplog.text == ""


def test_an_optimizer_without_parameters_raises():
    model = linear()
    optimizer = sgd(model)
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(ValueError, match="optimizer SGD .* holds no parameters"):
        trainer_of(model, optimizer)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda model: [], ValueError, "at least one, got an empty one"),
        (lambda model: "adam", TypeError, "must be a torch.optim.Optimizer.*got str"),
        (
            lambda model: torch.optim.SGD,
            TypeError,
            "must be a torch.optim.Optimizer.*got the class SGD; make one: SGD\\(\\.\\.\\.\\)",
        ),
        (lambda model: [sgd(model), None], TypeError, "must be a torch.optim.Optimizer.*got NoneType"),
        (lambda model: [sgd(model), sgd(model)], ValueError, "updated twice"),
        (lambda model: torch.optim.LBFGS(model.parameters()), TypeError, "LBFGS"),
    ],
)
def test_an_unusable_optimizer_raises(make, error, match):
    model = linear()
    with pytest.raises(error, match=match):
        create_trainer(model, make(model), mse_loss)


def test_a_scheduler_of_another_optimizer_raises():
    with pytest.raises(ValueError, match="scheduler StepLR was made for another optimizer"):
        trainer_of(scheduler=StepLR(sgd(linear()), 1))


def test_the_same_scheduler_twice_raises():
    model = linear()
    optimizer = sgd(model)
    scheduler = StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="scheduler StepLR is attached already"):
        trainer_of(model, optimizer, scheduler=[scheduler, scheduler])


@pytest.mark.parametrize(
    ("scheduler", "what"),
    [
        ("cosine", "str without 'step'"),
        (lambda step: 0.1, "function without 'step'"),
        (StepLR, r"the class StepLR; make one: StepLR\(\.\.\.\)"),
    ],
    ids=["text", "function", "class"],
)
def test_an_object_that_is_not_a_scheduler_raises(scheduler, what):
    with pytest.raises(TypeError, match=rf"scheduler must be a torch\.optim\.lr_scheduler, got {what}"):
        trainer_of(scheduler=scheduler)


def test_attaching_a_scheduler_that_was_passed_as_an_argument_raises():
    model = linear()
    optimizer = sgd(model)
    scheduler = StepLR(optimizer, 1)
    trainer = trainer_of(model, optimizer, scheduler=scheduler)
    for name in (None, "LRScheduling2"):
        with pytest.raises(ValueError, match="StepLR is attached already: it would be stepped twice.*not both"):
            LRScheduling(scheduler).attach(trainer, name)


def test_a_scheduler_that_needs_a_metric_raises():
    model = linear()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau follows a metric.*LRScheduling\(scheduler, metric="):
        trainer_of(model, optimizer, scheduler=ReduceLROnPlateau(optimizer))


@pytest.mark.parametrize("with_scheduler", [True, False])
def test_an_unknown_schedule_every_raises(with_scheduler):
    model = linear()
    optimizer = sgd(model)
    scheduler = StepLR(optimizer, 1) if with_scheduler else None
    with pytest.raises(ValueError, match="schedule_every must be 'step' or 'epoch', got 'batch'"):
        trainer_of(model, optimizer, scheduler=scheduler, schedule_every="batch")


@pytest.mark.parametrize(("model", "device"), [("cpu", "meta"), ("meta", "cpu"), ("cpu", "cuda")])
def test_a_model_on_another_device_raises(model, device):
    with pytest.raises(ValueError, match=f"device is '{device}' but the model is on '{model}'"):
        trainer_of(nn.Linear(3, 2, device=model), device=device)


@pytest.mark.parametrize("device", [None, "meta"])
def test_a_model_on_the_meta_device_raises(device):
    with pytest.raises(ValueError, match=r"the model is on 'meta'.*to_empty"):
        trainer_of(nn.Linear(3, 2, device="meta"), device=device)
