"""`create_evaluator`: evaluates the model in eval mode, and restores everything afterwards."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Accuracy, Loss, MeanSquaredError
from toys import batches, linear, sgd

from camshaft import (
    create_evaluator,
    create_trainer,
)


def deep_model():
    """A model with dropout and two batch norms, one of which is in eval mode."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(), torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)
    )
    model[1].eval()
    return model


def flags(model):
    return [part.training for part in model.modules()]


def draws():
    """The next number of each generator. Leaves their states unchanged."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return drawn


def test_metrics_equal_those_of_a_loop_in_eval_mode():
    model = deep_model()
    evaluator = create_evaluator(model, metrics={"mse": Loss(torch.nn.functional.mse_loss)})
    metrics = evaluator.run(batches(3)).metrics
    twin = deep_model().eval()
    with torch.no_grad():
        losses = [float(torch.nn.functional.mse_loss(twin(x), y)) for x, y in batches(3)]
    assert metrics["mse"] == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_training_flags_and_buffers_are_preserved():
    model = deep_model()
    before, buffers = flags(model), [buffer.clone() for buffer in model.buffers()]
    create_evaluator(model).run(batches(3))
    assert flags(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_the_model_runs_in_eval_and_inference_mode():
    model, seen = deep_model(), []
    evaluator = create_evaluator(model)
    record = lambda e: seen.append((any(flags(model)), torch.is_inference_mode_enabled(), e.state.y_pred.is_inference()))  # noqa: E731
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, record)
    evaluator.run(batches(2))
    assert seen == [(False, True, True)] * 2


def test_the_random_generators_are_preserved():
    evaluator = create_evaluator(deep_model())
    evaluator.add_event_handler(Events.ITERATION_STARTED, lambda: (random.random(), np.random.rand(), torch.rand(3)))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches(1, 12)[0]), batch_size=4, shuffle=True)
    before = draws()
    evaluator.run(loader)
    assert draws() == before


def test_everything_is_restored_after_an_exception():
    model = deep_model()
    evaluator, before, drawn = create_evaluator(model), flags(model), draws()

    @evaluator.on(Events.ITERATION_COMPLETED)
    def fail():
        torch.rand(3)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        evaluator.run(batches(2))
    assert (flags(model), draws()) == (before, drawn)
    assert not torch.is_inference_mode_enabled()


def test_it_can_run_again_after_an_exception():
    evaluator = create_evaluator(linear(), metrics={"mse": MeanSquaredError()})
    with pytest.raises(TypeError, match="a batch must be a pair"):
        evaluator.run([torch.zeros(2, 3)])
    assert evaluator.run(batches(2)).metrics["mse"] > 0


@pytest.mark.parametrize(("amp", "dtype"), [(None, torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)])
def test_amp_sets_the_precision_of_the_outputs(amp, dtype):
    evaluator = create_evaluator(linear(), amp=amp)
    evaluator.run(batches(1))
    assert evaluator.state.y_pred.dtype == dtype


def test_the_transforms_are_applied_in_order():
    evaluator = create_evaluator(
        linear(),
        metrics={"accuracy": Accuracy()},
        prepare_batch=lambda batch, device, non_blocking: (batch["in"], batch["out"]),
        model_transform=lambda y_pred: y_pred.argmax(1),
        output_transform=lambda x, y, y_pred: (torch.nn.functional.one_hot(y_pred, 2), y),
    )
    x = batches(1)[0][0]
    y = linear()(x).argmax(1)
    assert evaluator.run([{"in": x, "out": y}]).metrics["accuracy"] == 1


def test_evaluating_between_runs_does_not_change_training():
    def train(evaluate):
        model = deep_model()
        trainer = create_trainer(model, sgd(model), torch.nn.functional.mse_loss)
        evaluator = create_evaluator(model, metrics={"mse": MeanSquaredError()})
        torch.manual_seed(3)
        if evaluate:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: evaluator.run(batches(2)))
        trainer.run(batches(5), max_epochs=2)
        return list(model.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


WRONG = {
    "no model": (lambda: create_evaluator("model"), TypeError, "model must be a torch.nn.Module, got str"),
    "no metric": (lambda: create_evaluator(linear(), {"a": 3}), TypeError, r"metrics\['a'\] must be an ignite.metrics.Metric"),
    "no precision": (lambda: create_evaluator(linear(), amp="fp8"), ValueError, "amp must be None, 'bf16', 'fp16'"),
    "other device": (
        lambda: create_evaluator(linear(), device="meta"),
        ValueError,
        "device is 'meta' but the model is on 'cpu'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_arguments_raise_at_creation(name):
    call, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call()


def test_an_error_names_the_prepare_batch_that_does_not_return_a_pair():
    def three(batch, device, non_blocking):
        return 1, 2, 3

    with pytest.raises(TypeError, match=r"prepare_batch \(.*three\) must return \(x, y\), got \(1, 2, 3\)") as caught:
        create_evaluator(linear(), prepare_batch=three).run(batches(1))
    assert caught.value.__notes__ == ["camshaft: in epoch 1, iteration 1"]


def test_each_run_uses_all_data_of_unknown_length():
    class Unknown:
        def __init__(self, count):
            self.count = count

        def __iter__(self):
            return iter(batches(self.count))

    evaluator = create_evaluator(linear())
    assert [evaluator.run(Unknown(count)).iteration for count in (2, 4, 3)] == [2, 4, 3]


def test_a_metric_class_instead_of_an_instance_raises():
    with pytest.raises(TypeError, match=r"metrics\['accuracy'\] must be .*got the class Accuracy; make one: Accuracy\(\)"):
        create_evaluator(linear(), {"accuracy": Accuracy})


@pytest.mark.parametrize("argument", ["prepare_batch", "model_transform", "output_transform"])
def test_a_function_that_is_not_callable_raises(argument):
    with pytest.raises(TypeError, match=f"{argument} must be callable, got 3"):
        create_evaluator(torch.nn.Linear(2, 1), **{argument: 3})
