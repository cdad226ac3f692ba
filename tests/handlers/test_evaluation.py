"""Evaluation on any event and at the end of a run, without side effects on training."""

import random

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.metrics import Accuracy, Loss, MeanSquaredError
from toys import batches, linear, model_of, same, scripted, sgd, trainer_of, weights

from camshaft import EarlyStopping, Evaluation, ExponentialMovingAverage, StepEvents, create_evaluator, create_trainer

MSE = torch.nn.functional.mse_loss


def deep_model():
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(), torch.nn.Linear(4, 2))
    model[1].eval()
    return model


def ours(model):
    return create_evaluator(model, metrics={"mse": MeanSquaredError()})


def ignites(model):
    return create_supervised_evaluator(model, metrics={"mse": MeanSquaredError()})


MAKERS = {"ours": ours, "ignite's": ignites}


def runs_of(trainer, evaluator, **options):
    """The iterations after which the evaluator ran."""
    seen = []
    Evaluation(evaluator, batches(1), **options).attach(trainer)
    evaluator.add_event_handler(Events.COMPLETED, lambda: seen.append(trainer.state.iteration))
    return seen


@pytest.mark.parametrize("maker", MAKERS)
def test_the_trainer_has_the_metrics_under_the_prefix(maker):
    model = linear()
    trainer = trainer_of(model)
    Evaluation(MAKERS[maker](model), batches(2), prefix="test").attach(trainer)
    trainer.run(batches(3))
    with torch.no_grad():
        expected = sum(float((model(x) - y).square().sum()) for x, y in batches(2)) / 8
    assert dict(trainer.state.metrics) == {"test/mse": pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("maker", MAKERS)
def test_training_is_unaffected(maker):
    def train(evaluate):
        model = deep_model()
        trainer = create_trainer(model, sgd(model), MSE)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches(1, 12)[0]), batch_size=4, shuffle=True)
        if evaluate:
            Evaluation(MAKERS[maker](model), loader, every=Events.ITERATION_COMPLETED(every=2)).attach(trainer)
        torch.manual_seed(3)
        trainer.run(loader, max_epochs=2)
        return weights(model), random.random(), np.random.rand(), torch.rand(2)

    random.seed(1), np.random.seed(1)
    with_it = train(True)
    random.seed(1), np.random.seed(1)
    without = train(False)
    assert same(with_it[0], without[0])
    assert with_it[1:3] == without[1:3]
    assert torch.equal(with_it[3], without[3])


@pytest.mark.parametrize("maker", MAKERS)
def test_an_exception_restores_flags_and_random_state(maker):
    model = deep_model()
    trainer = create_trainer(model, sgd(model), MSE)
    evaluator, before = MAKERS[maker](model), [part.training for part in model.modules()]
    states = []

    @evaluator.on(Events.ITERATION_COMPLETED)
    def fail():
        torch.rand(3), np.random.rand(), random.random()
        raise ValueError("broken")

    Evaluation(evaluator, batches(1)).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: states.append((torch.get_rng_state(), random.getstate())))
    with pytest.raises(ValueError, match="broken"):
        trainer.run(batches(2))
    assert [part.training for part in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), states[-1][0])
    assert random.getstate() == states[-1][1]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (Events.EPOCH_COMPLETED, [3, 6, 9]),
        (Events.EPOCH_COMPLETED(every=2), [6, 9]),
        (Events.ITERATION_COMPLETED(every=4), [4, 8, 9]),
        (Events.EPOCH_COMPLETED | Events.ITERATION_COMPLETED(once=1), [1, 3, 6, 9]),
        (StepEvents.OPTIMIZER_STEP_COMPLETED(every=5), [5, 9]),
        (Events.STARTED, [0, 9]),
    ],
    ids=["epoch", "two epochs", "iterations", "both", "steps", "start"],
)
def test_it_runs_on_its_events_and_at_the_end_if_the_weights_have_changed(every, expected):
    trainer = trainer_of()
    seen = runs_of(trainer, ours(model_of(trainer)), every=every)
    trainer.run(batches(3), max_epochs=3)
    assert seen == expected


def test_it_runs_at_the_end_of_a_run_that_stops_early():
    trainer = trainer_of()
    seen = runs_of(trainer, ours(model_of(trainer)))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda e: e.terminate())
    trainer.run(batches(3), max_epochs=3)
    assert seen == [3, 5]


def test_it_does_not_run_twice_for_the_same_weights():
    trainer = trainer_of()
    seen = runs_of(trainer, ours(model_of(trainer)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda e: e.terminate())
    trainer.run(batches(3), max_epochs=3)
    assert seen == [3, 6]


def test_it_does_not_run_at_the_end_of_a_run_without_iterations():
    trainer = trainer_of()
    seen = runs_of(trainer, ours(model_of(trainer)))
    trainer.add_event_handler(Events.STARTED, lambda e: e.terminate())
    trainer.run(batches(3))
    assert seen == []


def test_two_evaluations_have_their_own_prefixes():
    trainer = trainer_of()
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    Evaluation(scripted([2.0]), [0], prefix="train").attach(trainer)
    trainer.run(batches(2))
    assert dict(trainer.state.metrics) == {"val/score": 1.0, "train/score": 2.0}
    assert list(trainer.handlers) == ["Evaluation/val", "Evaluation/train"]


def test_the_averaged_weights_can_be_evaluated():
    trainer = trainer_of()
    model = model_of(trainer)
    ema = ExponentialMovingAverage(0.5).attach(trainer)
    Evaluation(create_evaluator(model, metrics={"mse": Loss(MSE)}), batches(1), ema=ema).attach(trainer)
    trainer.run(batches(3))
    x, y = batches(1)[0]
    with torch.no_grad():
        expected, other = float(MSE(ema.module(x), y)), float(MSE(model(x), y))
    assert trainer.state.metrics["val/mse"] == pytest.approx(expected, rel=1e-6)
    assert trainer.state.metrics["val/mse"] != pytest.approx(other, rel=1e-6)


def test_an_evaluator_with_amp_restores_autocast():
    model = linear()
    trainer = trainer_of(model)
    evaluator = create_evaluator(model, metrics={"mse": Loss(MSE)}, amp="bf16")
    Evaluation(evaluator, batches(1)).attach(trainer)
    trainer.run(batches(2))
    assert evaluator.state.y_pred.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_it_works_on_a_plain_ignite_engine():
    engine, model = Engine(lambda engine, batch: None), linear()
    Evaluation(ours(model), batches(1)).attach(engine)
    EarlyStopping("val/mse", mode="min", patience=2).attach(engine)
    engine.run([0], max_epochs=9)
    assert engine.state.epoch == 3


def test_metrics_of_ignite_cover_all_batches_of_all_ranks():
    model = linear()
    trainer = trainer_of(model)
    evaluator = create_evaluator(model, {"accuracy": Accuracy()}, output_transform=lambda x, y, p: (p, y.argmax(1)))
    Evaluation(evaluator, batches(5)).attach(trainer)
    trainer.run(batches(1))
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y.argmax(1)).sum()) for x, y in batches(5))
    assert trainer.state.metrics["val/accuracy"] == right / 20


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Evaluation(linear(), []), "evaluator must be an Ignite engine, got Linear"),
        (lambda: Evaluation(scripted([1]), 3), "data must be batches that can be iterated over, got int"),
        (lambda: Evaluation(scripted([1]), [], prefix=""), "prefix must be a name such as 'val', got ''"),
        (lambda: Evaluation(scripted([1]), [], every=5), "expected an event such as Events.EPOCH_COMPLETED"),
        (lambda: Evaluation(scripted([1]), [], ema=3), "ema must be an ExponentialMovingAverage, got int"),
    ],
)
def test_wrong_arguments_are_errors(make, text):
    with pytest.raises(TypeError, match=text):
        make()


def test_attaching_to_its_own_evaluator_is_an_error():
    evaluator = create_evaluator(linear())
    with pytest.raises(ValueError, match=r"attach it to the trainer: Evaluation\(evaluator, data\)\.attach\(trainer\)"):
        Evaluation(evaluator, batches()).attach(evaluator)


def test_data_that_can_be_iterated_over_only_once_is_an_error():
    with pytest.raises(TypeError, match="data must be batches that can be iterated over again and again"):
        Evaluation(create_evaluator(torch.nn.Linear(2, 1)), iter(batches(2)))
