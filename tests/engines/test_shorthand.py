"""Arguments of `create_trainer` that attach a handler, and their errors."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR
from toys import batches, linear, same, sgd, trainer_of, weights
from training_loops import train_by_hand

from camshaft import (
    GradientAccumulation,
    GradientClipping,
    LRScheduling,
    MixedPrecision,
)

SHORTHAND = {
    "amp": ({"amp": "fp16"}, lambda: MixedPrecision("fp16")),
    "accumulation": (
        {"accumulation_steps": 2, "loss_weight": "samples", "partial_window": "drop"},
        lambda: GradientAccumulation(2, loss_weight="samples", partial_window="drop"),
    ),
    "clip_grad_norm": ({"clip_grad_norm": 0.1}, lambda: GradientClipping(max_norm=0.1)),
    "clip_grad_value": ({"clip_grad_value": 0.1}, lambda: GradientClipping(clip_value=0.1)),
    "both": ({"clip_grad_norm": 0.1, "clip_grad_value": 0.01}, lambda: GradientClipping(0.1, clip_value=0.01)),
}


def attributes(handler):
    """The attributes of a handler, except those that are set when it is attached."""
    return {name: value for name, value in vars(handler).items() if not name.startswith("_") and name != "engine"}


@pytest.mark.parametrize("kind", SHORTHAND)
def test_an_argument_attaches_an_equal_handler(kind):
    options, make = SHORTHAND[kind]
    short, long = trainer_of(linear(), **options), trainer_of(linear())
    handler = make().attach(long)
    (attached,) = short.handlers.values()
    assert list(short.handlers) == list(long.handlers)
    assert type(attached) is type(handler)
    assert attributes(attached) == attributes(handler)
    assert short.explain() == long.explain()
    short.run(batches(5))
    long.run(batches(5))
    assert same(weights(short.primary.module), weights(long.primary.module))


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_the_scheduler_argument_attaches_an_equal_handler(every):
    model = linear()
    optimizer = sgd(model)
    scheduler = ExponentialLR(optimizer, 0.5)
    trainer = trainer_of(model, optimizer, scheduler=scheduler, schedule_every=every)
    (attached,) = trainer.handlers.values()
    assert attributes(attached) == attributes(LRScheduling(scheduler, every=every)) | {"phase": "model", "name": "LRScheduling"}


@pytest.mark.parametrize("kind", SHORTHAND)
def test_detaching_the_handler_of_an_argument_undoes_it(kind):
    model = linear()
    trainer = trainer_of(model, **SHORTHAND[kind][0])
    (attached,) = trainer.handlers.values()
    attached.detach()
    trainer.run(batches())
    assert trainer.handlers == {}
    assert same(weights(model), train_by_hand(linear()))


def test_no_handler_is_attached_by_default():
    assert trainer_of().handlers == {}


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None])
def test_invalid_accumulation_steps_raise(value):
    with pytest.raises(ValueError, match=f"accumulation_steps must be a positive integer, got {value!r}"):
        trainer_of(accumulation_steps=value)


@pytest.mark.parametrize("value", ["fp8", "float16", True, 16, torch.float32, torch.float64])
def test_an_unknown_amp_raises(value):
    with pytest.raises(ValueError, match=f"amp must be None, 'bf16', 'fp16'.* got {value!r}"):
        trainer_of(amp=value)


@pytest.mark.parametrize("argument", ["clip_grad_norm", "clip_grad_value"])
@pytest.mark.parametrize("value", [-1.0, 0, float("nan"), "1", True])
def test_an_invalid_clipping_bound_raises(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} .*must be a positive number, got {value!r}"):
        trainer_of(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("loss_weight", "tokens", "'batch', 'samples' or a function"),
        ("loss_weight", None, "'batch', 'samples' or a function"),
        ("partial_window", "keep", "'step' or 'drop'"),
    ],
)
def test_an_unknown_choice_raises(argument, value, allowed):
    with pytest.raises(ValueError, match=f"{argument} must be {allowed}.*got {value!r}"):
        trainer_of(**{argument: value})
