"""`create_trainer`: objectives, transforms, several optimizers, and what an iteration leaves behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from ignite.engine import Engine
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from toys import batches, collect, data_parallel, linear, same, sgd, trainer_of, weights
from training_loops import train_by_hand

from camshaft import (
    Events,
    StepEvents,
    Trainer,
    create_trainer,
)


def test_a_trainer_is_an_ignite_engine():
    trainer = trainer_of()
    assert isinstance(trainer, Trainer)
    assert isinstance(trainer, Engine)


def test_compute_loss_replaces_model_and_loss_fn():
    model = linear()
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda model, batch: mse_loss(model(batch[0]), batch[1]))
    trainer.run(batches())
    assert same(weights(model), train_by_hand(linear()))


def test_compute_loss_receives_the_model_and_the_complete_batch():
    model, seen = linear(), []

    def objective(model, batch):
        seen.append((model, sorted(batch)))
        return mse_loss(model(batch["a"]), batch["b"])

    data = [{"a": x, "b": y, "extra": "text"} for x, y in batches(1)]
    create_trainer(model, sgd(model), None, compute_loss=objective).run(data)
    assert seen == [(model, ["a", "b", "extra"])]


def test_other_entries_of_compute_loss_are_kept_by_name_and_detached():
    model = linear()

    def objective(model, batch):
        fit, size = mse_loss(model(batch[0]), batch[1]), model.weight.square().sum()
        return {"loss": fit + 0.1 * size, "fit": fit, "size": size, "count": 4}

    trainer = create_trainer(model, sgd(model), None, compute_loss=objective)
    trainer.run(batches(1))
    losses, expected = trainer.state.losses, objective(linear(), batches(1)[0])
    assert sorted(losses) == ["count", "fit", "size"]
    assert not losses["fit"].requires_grad
    assert torch.equal(losses["fit"], expected["fit"])
    assert torch.equal(trainer.state.output, expected["loss"])


def test_compute_loss_leaves_x_y_and_y_pred_unset():
    model = linear()
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda model, batch: model(batch[0]).mean())
    seen = collect(trainer, StepEvents.FORWARD_COMPLETED, lambda e: (e.state.x, e.state.y, e.state.y_pred))
    trainer.run(batches(2))
    assert seen == [(None, None, None)] * 2


@pytest.mark.parametrize(("amp", "dtype"), [(None, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_compute_loss_runs_under_autocast(amp, dtype):
    model, seen = linear(), []

    def objective(model, batch):
        y_pred = model(batch[0])
        seen.append(y_pred.dtype)
        return mse_loss(y_pred, batch[1])

    create_trainer(model, sgd(model), None, compute_loss=objective, amp=amp).run(batches(1))
    assert seen == [dtype]


def test_model_transform_is_applied_before_the_loss():
    model = linear()
    trainer = trainer_of(model, model_transform=lambda out: 3 * out)
    seen = collect(trainer, StepEvents.FORWARD_COMPLETED, lambda e: e.state.y_pred.detach() / 3)
    trainer.run(batches())
    assert same(weights(model), train_by_hand(linear(), loss_fn=lambda y_pred, y: mse_loss(3 * y_pred, y)))
    torch.testing.assert_close(seen[0], linear()(batches()[0][0]).detach())


def test_output_transform_receives_detached_tensors():
    seen = []

    def transform(x, y, y_pred, loss):
        seen.extend((x, y, y_pred["out"], loss))
        return float(loss)

    model = nn.Sequential(linear())
    data = [(x.requires_grad_(), y) for x, y in batches(1)]
    trainer = trainer_of(
        model,
        loss_fn=lambda y_pred, y: mse_loss(y_pred["out"], y),
        model_transform=lambda out: {"out": out},
        output_transform=transform,
    )
    trainer.run(data)
    assert not any(tensor.requires_grad for tensor in seen)
    assert trainer.state.output == mse_loss(linear()(data[0][0]), data[0][1]).item()


def two_layers():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def two_optimizers(model):
    return [sgd(model[0], lr=0.2, momentum=0.9), torch.optim.Adam(model[2].parameters(), lr=0.01)]


@pytest.mark.parametrize("sequence", [list, tuple])
def test_several_optimizers_step_on_each_iteration(sequence):
    model, expected = two_layers(), two_layers()
    trainer = trainer_of(model, sequence(two_optimizers(model)))
    optimizers = two_optimizers(expected)
    for x, y in batches():
        expected.zero_grad()
        mse_loss(expected(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert trainer.run(batches()).optimizer_step == 3
    assert same(weights(model), weights(expected))


def test_several_schedulers_step_on_each_iteration():
    model = two_layers()
    optimizers = two_optimizers(model)
    schedulers = [ExponentialLR(optimizers[0], 0.5), StepLR(optimizers[1], 2, gamma=0.1)]
    trainer_of(model, optimizers, scheduler=schedulers).run(batches())
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([0.025, 0.001])


@pytest.mark.parametrize(("every", "rate"), [("step", 0.1 * 0.5**6), ("epoch", 0.1 * 0.5**2)])
def test_a_schedule_can_step_every_step_or_every_epoch(every, rate):
    model = linear()
    optimizer = sgd(model)
    trainer_of(model, optimizer, scheduler=ExponentialLR(optimizer, 0.5), schedule_every=every).run(batches(), max_epochs=2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_one_optimizer_may_have_two_schedulers():
    model = linear()
    optimizer = sgd(model)
    trainer_of(model, optimizer, scheduler=[ExponentialLR(optimizer, 0.5), ExponentialLR(optimizer, 0.1)]).run(batches())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.05**3)


def test_a_data_parallel_model_is_trained():
    model = linear()
    trainer_of(data_parallel(model)).run(batches(), max_epochs=2)
    assert same(weights(model), train_by_hand(linear(), batches() * 2))


class Scaled(nn.Module):
    """A loss with a trainable weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y_pred, y):
        return mse_loss(y_pred * self.scale, y)


def test_parameters_of_the_loss_are_trained_and_clipped():
    model, loss_fn, expected, by_hand_loss = linear(), Scaled(), linear(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1)
    trainer_of(model, optimizer, loss_fn, clip_grad_norm=0.1).run(batches())
    everything = [*expected.parameters(), *by_hand_loss.parameters()]
    optimizer = torch.optim.SGD(everything, lr=0.1)
    for x, y in batches():
        optimizer.zero_grad()
        by_hand_loss(expected(x), y).backward()
        nn.utils.clip_grad_norm_(everything, 0.1)
        optimizer.step()
    assert same(weights(model) + weights(loss_fn), weights(expected) + weights(by_hand_loss))
    assert loss_fn.scale.item() != 1.0


def test_parameters_that_are_not_in_the_optimizer_do_not_change():
    model = two_layers()
    before = weights(model[0])
    trainer_of(model, sgd(model[2])).run(batches())
    assert same(weights(model[0]), before)
    assert not same(weights(model), weights(two_layers()))


def trainers_by_kind(model):
    return {
        "loss_fn": lambda: trainer_of(model),
        "transforms": lambda: trainer_of(
            model,
            loss_fn=lambda y_pred, y: mse_loss(y_pred["out"], y),
            model_transform=lambda out: {"out": out},
            output_transform=lambda x, y, y_pred, loss: (y_pred, loss),
        ),
        "compute_loss": lambda: create_trainer(
            model,
            sgd(model),
            None,
            compute_loss=lambda model, batch: {"loss": mse_loss(model(batch[0]), batch[1]), "mean": model(batch[0]).mean()},
        ),
        "accumulation": lambda: trainer_of(model, accumulation_steps=3, loss_weight="samples"),
        "fp16": lambda: trainer_of(model, amp="fp16", clip_grad_norm=1.0),
    }


@pytest.mark.parametrize("kind", trainers_by_kind(None))
def test_the_autograd_graph_is_freed_after_each_iteration(kind):
    """A weak reference to a node of the graph is dead as soon as the iteration is over."""
    model = linear()
    trainer = trainers_by_kind(model)[kind]()
    nodes, alive = [], []

    @trainer.on(StepEvents.FORWARD_COMPLETED)
    def remember(engine):
        node = engine.state.loss.grad_fn
        node.metadata["mark"] = mark = nn.Identity()
        nodes.append(weakref.ref(mark))

    @trainer.on(Events.ITERATION_COMPLETED)
    def record():
        gc.collect()
        alive.append([node() is not None for node in nodes])

    trainer.run(batches(2))
    assert alive == [[False], [False, False]]
    state = trainer.state
    assert not any(getattr(value, "requires_grad", False) for value in (state.loss, state.y_pred, state.output))
