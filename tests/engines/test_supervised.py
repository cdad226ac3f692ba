"""``create_trainer``: objectives, batches, optimizers, modes, and what is left of an iteration when it is over."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from ignite.engine import Engine
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from toys import batches, linear, same, sgd, trainer_of, weights

from camshaft import (
    Events,
    GradientAccumulation,
    GradientClipping,
    LRScheduling,
    MixedPrecision,
    StepEvents,
    Trainer,
    create_trainer,
)


def by_hand(model, data=None, optimizer=None, loss_fn=mse_loss):
    """The loop without anything."""
    optimizer = sgd(model) if optimizer is None else optimizer
    for x, y in batches() if data is None else data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return weights(model)


def collect(trainer, event, what):
    seen = []
    trainer.add_event_handler(event, lambda engine: seen.append(what(engine)))
    return seen


def test_trainer_is_an_engine_of_ignite():
    trainer = trainer_of()
    assert isinstance(trainer, Trainer)
    assert isinstance(trainer, Engine)


# -- compute_loss -----------------------------------------------------------------------------------------------------


def test_compute_loss_replaces_model_and_loss_fn():
    model = linear()
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda model, batch: mse_loss(model(batch[0]), batch[1]))
    trainer.run(batches())
    assert same(weights(model), by_hand(linear()))


def test_compute_loss_gets_the_trainers_model_and_the_whole_batch():
    model, seen = linear(), []

    def objective(model, batch):
        seen.append((model, sorted(batch)))
        return mse_loss(model(batch["a"]), batch["b"])

    data = [{"a": x, "b": y, "extra": "text"} for x, y in batches(1)]
    create_trainer(model, sgd(model), None, compute_loss=objective).run(data)
    assert seen == [(model, ["a", "b", "extra"])]


def test_entries_beside_the_loss_are_kept_by_name_and_detached():
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


def test_compute_loss_leaves_x_y_and_y_pred_empty():
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


# -- batches ----------------------------------------------------------------------------------------------------------


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
def test_batches_of_any_kind(kind):
    pack, unpack = PREPARED[kind]
    options = {} if unpack is None else {"prepare_batch": lambda batch, device, non_blocking: unpack(batch)}
    model = linear()
    trainer_of(model, **options).run([pack(x, y) for x, y in batches()])
    assert same(weights(model), by_hand(linear()))


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("loss_weight", ["samples", "batch"])
def test_batches_of_any_kind_are_weighed_and_accumulated(kind, loss_weight):
    pack, unpack = PREPARED[kind]
    options = {} if unpack is None else {"prepare_batch": lambda batch, device, non_blocking: unpack(batch)}
    model = linear(torch.float64)
    trainer = trainer_of(model, accumulation_steps=3, loss_weight=loss_weight, **options)
    trainer.run([pack(x, y) for x, y in batches(dtype=torch.float64)])
    big = tuple(torch.cat(part) for part in zip(*batches(dtype=torch.float64), strict=True))
    torch.testing.assert_close(weights(model), by_hand(linear(torch.float64), [big]), rtol=1e-12, atol=1e-12)


def test_x_and_y_may_be_nests_that_the_model_and_the_loss_understand():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, parts):
            return {"y": self.inner(parts["left"] + parts["right"])}

    model = Sum()
    data = [({"left": x, "right": x}, [y]) for x, y in batches()]
    trainer_of(model, loss_fn=lambda y_pred, y: mse_loss(y_pred["y"], y[0])).run(data)
    assert same(weights(model.inner), by_hand(linear(), [(2 * x, y) for x, y in batches()]))


def test_prepare_batch_gets_device_and_non_blocking():
    seen = []

    def prepare(batch, device, non_blocking):
        seen.append((device, non_blocking))
        return batch

    trainer_of(prepare_batch=prepare, non_blocking=False).run(batches(1))
    assert seen == [(torch.device("cpu"), False)]


# -- transforms -------------------------------------------------------------------------------------------------------


def test_model_transform_is_applied_before_the_loss():
    model = linear()
    trainer = trainer_of(model, model_transform=lambda out: 3 * out)
    seen = collect(trainer, StepEvents.FORWARD_COMPLETED, lambda e: e.state.y_pred.detach() / 3)
    trainer.run(batches())
    assert same(weights(model), by_hand(linear(), loss_fn=lambda y_pred, y: mse_loss(3 * y_pred, y)))
    torch.testing.assert_close(seen[0], linear()(batches()[0][0]).detach())


def test_output_transform_gets_detached_tensors():
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


# -- several optimizers and schedulers --------------------------------------------------------------------------------


def two_layers():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def two_optimizers(model):
    return [sgd(model[0], lr=0.2, momentum=0.9), torch.optim.Adam(model[2].parameters(), lr=0.01)]


@pytest.mark.parametrize("sequence", [list, tuple])
def test_several_optimizers_step_together(sequence):
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


def test_several_schedulers_step_together():
    model = two_layers()
    optimizers = two_optimizers(model)
    schedulers = [ExponentialLR(optimizers[0], 0.5), StepLR(optimizers[1], 2, gamma=0.1)]
    trainer_of(model, optimizers, scheduler=schedulers).run(batches())
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([0.025, 0.001])


@pytest.mark.parametrize(("every", "rate"), [("step", 0.1 * 0.5**6), ("epoch", 0.1 * 0.5**2)])
def test_schedule_every_step_or_epoch(every, rate):
    model = linear()
    optimizer = sgd(model)
    trainer_of(model, optimizer, scheduler=ExponentialLR(optimizer, 0.5), schedule_every=every).run(batches(), max_epochs=2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_one_optimizer_may_have_two_schedulers():
    model = linear()
    optimizer = sgd(model)
    trainer_of(model, optimizer, scheduler=[ExponentialLR(optimizer, 0.5), ExponentialLR(optimizer, 0.1)]).run(batches())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.05**3)


# -- wrapped models, modes, losses with weights -----------------------------------------------------------------------


def test_data_parallel_model():
    model = linear()
    trainer_of(nn.DataParallel(model)).run(batches(), max_epochs=2)
    assert same(weights(model), by_hand(linear(), batches() * 2))


def with_batch_norm():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_model_in_eval_mode_is_put_in_training_mode():
    model = with_batch_norm().eval()
    trainer = trainer_of(model)
    seen = collect(trainer, StepEvents.FORWARD_STARTED, lambda e: all(part.training for part in model.modules()))
    trainer.run(batches())
    assert seen == [True] * 3


def test_model_left_in_eval_mode_by_a_handler_trains_again():
    model = with_batch_norm()
    trainer = trainer_of(model)
    seen = collect(trainer, StepEvents.FORWARD_STARTED, lambda e: model.training)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: model.eval() and None)
    trainer.run(batches())
    assert seen == [True] * 3


@pytest.mark.parametrize("put_in_eval_by_a_handler", [False, True])
def test_frozen_batch_norm_stays_in_eval(put_in_eval_by_a_handler):
    model = with_batch_norm()
    model[1].eval()
    trainer = trainer_of(model)
    modes = collect(trainer, StepEvents.FORWARD_STARTED, lambda e: [part.training for part in model.modules()])
    if put_in_eval_by_a_handler:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: model.eval() and None)
    trainer.run(batches(), max_epochs=2)
    assert modes == [[True, True, False, True, True]] * 6
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_batch_norm_frozen_after_the_trainer_was_made_stays_in_eval():
    model = with_batch_norm()
    trainer = trainer_of(model)
    model[1].eval()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: model.eval() and None)
    trainer.run(batches())
    assert torch.equal(model[1].running_mean, torch.zeros(4))


class Scaled(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y_pred, y):
        return mse_loss(y_pred * self.scale, y)


def test_loss_with_parameters_of_its_own_is_trained_and_clipped():
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


def test_parameters_that_the_optimizer_does_not_hold_stay():
    model = two_layers()
    before = weights(model[0])
    trainer_of(model, sgd(model[2])).run(batches())
    assert same(weights(model[0]), before)
    assert not same(weights(model), weights(two_layers()))


# -- the loss and the output ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("loss_weight", ["batch", "samples"])
def test_loss_and_output_are_undivided_under_accumulation(amp, loss_weight):
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


def test_output_is_detached_and_on_the_models_device():
    trainer = trainer_of()
    trainer.run(batches(1))
    output = trainer.state.output
    assert (output.requires_grad, output.grad_fn, output.device, output.shape) == (False, None, torch.device("cpu"), ())


def test_handler_may_replace_the_loss():
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


# -- what outlives an iteration ---------------------------------------------------------------------------------------


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
def test_nothing_of_the_graph_outlives_the_iteration(kind):
    """A node of the graph that is remembered weakly is gone as soon as the iteration is over."""
    model = linear()
    trainer = trainers_by_kind(model)[kind]()
    nodes, alive = [], []

    @trainer.on(StepEvents.FORWARD_COMPLETED)
    def remember(engine):
        node = engine.state.loss.grad_fn
        node.metadata["mark"] = mark = nn.Identity()
        nodes.append(weakref.ref(mark))

    @trainer.on(Events.ITERATION_COMPLETED)
    def look():
        gc.collect()
        alive.append([node() is not None for node in nodes])

    trainer.run(batches(2))
    assert alive == [[False], [False, False]]
    state = trainer.state
    assert not any(getattr(value, "requires_grad", False) for value in (state.loss, state.y_pred, state.output))


# -- arguments are handlers -------------------------------------------------------------------------------------------


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


def settings(handler):
    """A handler's own attributes, without what belongs to being attached."""
    return {name: value for name, value in vars(handler).items() if not name.startswith("_") and name != "engine"}


@pytest.mark.parametrize("kind", SHORTHAND)
def test_argument_attaches_the_very_handler(kind):
    options, make = SHORTHAND[kind]
    short, long = trainer_of(linear(), **options), trainer_of(linear())
    handler = make().attach(long)
    (attached,) = short.handlers.values()
    assert list(short.handlers) == list(long.handlers)
    assert type(attached) is type(handler)
    assert settings(attached) == settings(handler)
    assert short.explain() == long.explain()
    short.run(batches(5))
    long.run(batches(5))
    assert same(weights(short.primary.module), weights(long.primary.module))


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_scheduler_argument_attaches_the_very_handler(every):
    model = linear()
    optimizer = sgd(model)
    scheduler = ExponentialLR(optimizer, 0.5)
    trainer = trainer_of(model, optimizer, scheduler=scheduler, schedule_every=every)
    (attached,) = trainer.handlers.values()
    assert settings(attached) == settings(LRScheduling(scheduler, every=every)) | {"phase": "model", "name": "LRScheduling"}


@pytest.mark.parametrize("kind", SHORTHAND)
def test_detaching_the_arguments_handler_takes_it_back(kind):
    model = linear()
    trainer = trainer_of(model, **SHORTHAND[kind][0])
    (attached,) = trainer.handlers.values()
    attached.detach()
    trainer.run(batches())
    assert trainer.handlers == {}
    assert same(weights(model), by_hand(linear()))


def test_nothing_is_attached_unless_asked_for():
    assert trainer_of().handlers == {}
