"""Batches of any structure, `prepare_batch` and `loss_weight`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from toys import batches, linear, names_iteration, same, trainer_of, weights
from training_loops import train_by_hand

from camshaft import (
    create_evaluator,
)


@dataclass
class Pair:
    inputs: torch.Tensor
    targets: torch.Tensor


class Named(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


PREPARED = {
    "dict": (lambda x, y: {"inputs": x, "targets": y}, lambda b: (b["inputs"], b["targets"])),
    "dataclass": (Pair, lambda b: (b.inputs, b.targets)),
    "named tuple": (Named, lambda b: (b.inputs, b.targets)),
    "nested": (lambda x, y: [{"in": (x,)}, None, {"out": [y]}], lambda b: (b[0]["in"][0], b[2]["out"][0])),
    "list": (lambda x, y: [x, y], None),
}


@pytest.mark.parametrize("kind", PREPARED)
def test_batches_of_any_type_are_trained_on(kind):
    pack, unpack = PREPARED[kind]
    options = {} if unpack is None else {"prepare_batch": lambda batch, device, non_blocking: unpack(batch)}
    model = linear()
    trainer_of(model, **options).run([pack(x, y) for x, y in batches()])
    assert same(weights(model), train_by_hand(linear()))


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("loss_weight", ["samples", "batch"])
def test_batches_of_any_type_are_weighted_and_accumulated(kind, loss_weight):
    pack, unpack = PREPARED[kind]
    options = {} if unpack is None else {"prepare_batch": lambda batch, device, non_blocking: unpack(batch)}
    model = linear(torch.float64)
    trainer = trainer_of(model, accumulation_steps=3, loss_weight=loss_weight, **options)
    trainer.run([pack(x, y) for x, y in batches(dtype=torch.float64)])
    big = tuple(torch.cat(part) for part in zip(*batches(dtype=torch.float64), strict=True))
    torch.testing.assert_close(weights(model), train_by_hand(linear(torch.float64), [big]), rtol=1e-12, atol=1e-12)


def test_x_and_y_may_be_nested():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, parts):
            return {"y": self.inner(parts["left"] + parts["right"])}

    model = Sum()
    data = [({"left": x, "right": x}, [y]) for x, y in batches()]
    trainer_of(model, loss_fn=lambda y_pred, y: mse_loss(y_pred["y"], y[0])).run(data)
    assert same(weights(model.inner), train_by_hand(linear(), [(2 * x, y) for x, y in batches()]))


def test_prepare_batch_receives_device_and_non_blocking():
    seen = []

    def prepare(batch, device, non_blocking):
        seen.append((device, non_blocking))
        return batch

    trainer_of(prepare_batch=prepare, non_blocking=False).run(batches(1))
    assert seen == [(torch.device("cpu"), False)]


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ((torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4)), "a tuple of 3"),
        ([torch.zeros(4, 3)], "a list of 1"),
        ({"x": torch.zeros(4, 3), "y": torch.zeros(4, 2)}, r"a dict with the keys \['x', 'y'\]"),
        (torch.zeros(2, 3), r"a tensor of shape \(2, 3\)"),
        ("text", "a str"),
        (None, "a NoneType"),
    ],
    ids=["triple", "single", "dict", "tensor of two rows", "text", "none"],
)
def test_a_batch_that_is_not_a_pair_raises(batch, what):
    with pytest.raises(TypeError, match=f"pair.*got {what}.*prepare_batch") as caught:
        trainer_of().run([*batches(1), batch])
    assert names_iteration(caught, 2)


@pytest.mark.parametrize("result", [None, 5, (1, 2, 3)])
def test_a_prepare_batch_that_does_not_return_a_pair_raises(result):
    def prepare(batch, device, non_blocking):
        return result

    with pytest.raises(TypeError, match=r"prepare_batch .*prepare.* must return \(x, y\)") as caught:
        trainer_of(prepare_batch=prepare).run(batches())
    assert names_iteration(caught, 1)


@pytest.mark.parametrize("create", [trainer_of, lambda **options: create_evaluator(linear(), **options)])
def test_a_prepare_batch_without_a_device_argument_raises(create):
    def prepare(batch):
        return batch

    match = r"called as prepare_batch\(batch, device=\.\.\., non_blocking=\.\.\.\), but .*prepare takes \(batch\); write def"
    with pytest.raises(TypeError, match=match):
        create(prepare_batch=prepare)


@pytest.mark.parametrize("argument", ["prepare_batch", "model_transform", "output_transform"])
def test_an_argument_that_is_not_callable_raises(argument):
    with pytest.raises(TypeError, match=f"{argument} must be callable, got 5"):
        trainer_of(**{argument: 5})


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (-1, "at least 0, got -1"),
        (float("nan"), "finite number of at least 0, got nan"),
        (float("inf"), "finite number of at least 0, got inf"),
        (None, "finite number of at least 0, got None"),
        (torch.ones(3), "finite number"),
        (torch.tensor(-2.0), "at least 0, got -2.0"),
        (0, "weighs 0"),
    ],
)
def test_an_invalid_weight_raises(weight, match):
    def tokens(batch):
        return weight

    with pytest.raises(ValueError, match=match) as caught:
        trainer_of(loss_weight=tokens, accumulation_steps=2).run(batches(4))
    assert names_iteration(caught, 2 if match == "weighs 0" else 1)


def test_loss_weight_samples_needs_a_tensor_with_a_length():
    with pytest.raises(TypeError, match="loss_weight='samples' needs a tensor with a length"):
        trainer_of(loss_weight="samples", prepare_batch=lambda batch, **_: batches(1)[0]).run([("a", "b")])
