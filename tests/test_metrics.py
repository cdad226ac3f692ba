"""Metrics of a run: comparing, writing, watching and converting them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.metrics import Loss
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ReduceLROnPlateau
from toys import batches, linear, names_iteration, sgd, trainer_of

from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Evaluation,
    Events,
    LRScheduling,
    create_evaluator,
)
from camshaft.metrics import Metrics, MetricWatch, as_number, better

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("score", "best", "mode", "delta", "expected"),
    [
        (1.0, None, "max", 0.0, True),
        (1.0, 1.0, "max", 0.0, False),
        (1.1, 1.0, "max", 0.0, True),
        (1.1, 1.0, "max", 0.2, False),
        (0.9, 1.0, "min", 0.0, True),
        (0.9, 1.0, "min", 0.2, False),
        (-2.0, -1.0, "min", 0.5, True),
        (NAN, None, "max", 0.0, False),
        (INF, 1.0, "max", 0.0, False),
        (-INF, 1.0, "min", 0.0, False),
    ],
)
def test_better_is_strict_and_finite(score, best, mode, delta, expected):
    assert better(score, best, mode, delta) is expected


WRITES = {
    "item": lambda m: m.__setitem__("a", 1),
    "update": lambda m: m.update(a=1),
    "update of a mapping": lambda m: m.update({"a": 1}),
    "or": lambda m: m.__ior__({"a": 1}),
    "setdefault": lambda m: (m.pop("a", None), m.setdefault("a", 1)),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_way_of_writing_a_metric_counts(name):
    metrics = Metrics(a=0)
    before, version = metrics.writes["a"], metrics.version
    WRITES[name](metrics)
    assert metrics["a"] == 1
    assert metrics.writes["a"] == before + 1
    assert metrics.version == version + 1


def test_a_recalled_metric_is_there_and_not_new():
    metrics = Metrics()
    metrics.recall({"a": 1})
    assert metrics == {"a": 1}
    assert metrics.writes["a"] == 0


def test_a_watch_sees_each_writing_once_even_of_the_same_value():
    trainer = trainer_of()
    watch = MetricWatch("a", "Test")
    for _ in range(3):
        trainer.state.metrics["a"] = 1.0
        assert watch.is_new(trainer)
        assert watch.take(trainer) == 1.0
        assert not watch.is_new(trainer)


def test_a_watch_sees_metrics_that_are_replaced_as_a_whole():
    trainer = trainer_of()
    watch = MetricWatch("a", "Test")
    for value in (1.0, 2.0, 3.0):
        trainer.state.metrics = {"a": value}
        assert watch.is_new(trainer)
        assert watch.take(trainer) == value


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2), torch.tensor([[2.0]]), np.float32(2), np.array(2)])
def test_a_single_number_of_any_kind_is_one(value):
    assert as_number(value, "score") == 2.0


@pytest.mark.parametrize("value", [None, "high", torch.ones(2), [1.0], {}])
def test_anything_else_is_an_error_that_shows_it(value):
    with pytest.raises(TypeError, match="score must be a single number, got"):
        as_number(value, "score")


def judges(folder, optimizer):
    return {
        "early stopping": EarlyStopping("val/acuracy"),
        "rotation": CheckpointRotation(folder, keep_best=1, metric="val/acuracy"),
        "schedule": LRScheduling(ReduceLROnPlateau(optimizer), metric="val/acuracy"),
    }


@pytest.mark.parametrize("with_evaluation", [True, False])
@pytest.mark.parametrize("kind", ["early stopping", "rotation", "schedule"])
def test_metric_that_never_appears(kind, with_evaluation, tmp_path):
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    judges(tmp_path, optimizer)[kind].attach(trainer)
    if with_evaluation:
        Evaluation(create_evaluator(model, {"loss": Loss(mse_loss)}), batches()).attach(trainer)
    known = "'val/loss'" if with_evaluation else "none"
    with pytest.raises(ValueError, match=f"no metric named 'val/acuracy' by the end of epoch 1.*has {known}") as caught:
        trainer.run(batches(3), max_epochs=5)
    assert names_iteration(caught, 3)


def test_a_metric_that_the_last_evaluation_did_not_bring_either():
    trainer = trainer_of()
    evaluator = create_evaluator(trainer.primary.module, metrics={"l": Loss(torch.nn.functional.mse_loss)})
    Evaluation(evaluator, batches(1), every=Events.EPOCH_COMPLETED(every=5)).attach(trainer)
    EarlyStopping("val/loss", mode="min").attach(trainer)
    with pytest.raises(ValueError, match="no metric named 'val/loss' in the whole run; engine.state.metrics has 'val/l'"):
        trainer.run(batches(2), max_epochs=3)
