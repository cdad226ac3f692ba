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
def test_better_is_strict_and_ignores_non_finite_scores(score, best, mode, delta, expected):
    assert better(score, best, mode, delta) is expected


WRITES = {
    "item": lambda m: m.__setitem__("a", 1),
    "update": lambda m: m.update(a=1),
    "update of a mapping": lambda m: m.update({"a": 1}),
    "or": lambda m: m.__ior__({"a": 1}),
    "setdefault": lambda m: (m.pop("a", None), m.setdefault("a", 1)),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_way_of_setting_a_metric_increments_its_counter(name):
    metrics = Metrics(a=0)
    before, version = metrics.writes["a"], metrics.version
    WRITES[name](metrics)
    assert metrics["a"] == 1
    assert metrics.writes["a"] == before + 1
    assert metrics.version == version + 1


def test_a_restored_metric_does_not_count_as_new():
    metrics = Metrics()
    metrics.recall({"a": 1})
    assert metrics == {"a": 1}
    assert metrics.writes["a"] == 0


def test_a_watch_reports_each_update_once_even_with_the_same_value():
    trainer = trainer_of()
    watch = MetricWatch("a", "Test")
    for _ in range(3):
        trainer.state.metrics["a"] = 1.0
        assert watch.is_new(trainer)
        assert watch.take(trainer) == 1.0
        assert not watch.is_new(trainer)


def test_a_watch_reports_a_replaced_metrics_dictionary():
    trainer = trainer_of()
    watch = MetricWatch("a", "Test")
    for value in (1.0, 2.0, 3.0):
        trainer.state.metrics = {"a": value}
        assert watch.is_new(trainer)
        assert watch.take(trainer) == value


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2), torch.tensor([[2.0]]), np.float32(2), np.array(2)])
def test_as_number_accepts_single_numbers_of_any_type(value):
    assert as_number(value, "score") == 2.0


@pytest.mark.parametrize("value", [None, "high", torch.ones(2), [1.0], {}])
def test_as_number_rejects_other_values(value):
    with pytest.raises(TypeError, match="score must be a single number, got"):
        as_number(value, "score")


def handlers_that_need_a_metric(folder, optimizer):
    return {
        "early stopping": EarlyStopping("val/acuracy"),
        "rotation": CheckpointRotation(folder, keep_best=1, metric="val/acuracy"),
        "schedule": LRScheduling(ReduceLROnPlateau(optimizer), metric="val/acuracy"),
    }


@pytest.mark.parametrize("with_evaluation", [True, False])
@pytest.mark.parametrize("kind", ["early stopping", "rotation", "schedule"])
def test_a_metric_that_is_never_set_raises_after_the_first_epoch(kind, with_evaluation, tmp_path):
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    handlers_that_need_a_metric(tmp_path, optimizer)[kind].attach(trainer)
    if with_evaluation:
        Evaluation(create_evaluator(model, {"loss": Loss(mse_loss)}), batches()).attach(trainer)
    known = "'val/loss'" if with_evaluation else "none"
    with pytest.raises(ValueError, match=f"no metric named 'val/acuracy' by the end of epoch 1.*has {known}") as caught:
        trainer.run(batches(3), max_epochs=5)
    assert names_iteration(caught, 3)


def test_a_metric_that_no_evaluation_sets_raises_at_the_end_of_the_run():
    trainer = trainer_of()
    evaluator = create_evaluator(trainer.primary.module, metrics={"l": Loss(torch.nn.functional.mse_loss)})
    Evaluation(evaluator, batches(1), every=Events.EPOCH_COMPLETED(every=5)).attach(trainer)
    EarlyStopping("val/loss", mode="min").attach(trainer)
    with pytest.raises(ValueError, match="no metric named 'val/loss' in this run; engine.state.metrics has 'val/l'"):
        trainer.run(batches(2), max_epochs=3)
