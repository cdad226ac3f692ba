"""Which curves share a chart, and how an end is put in words."""

import re

import pytest

from camshaft.tensorboard_tags import finished, layout

METRICS = ["val/loss", "val/accuracy", "val/f1/0", "val/f1/1", "test/accuracy", "top-1 (%)", "ema/val/iou"]
RATES = ["train/lr", "train/lr/head", "train/generator/lr"]
TAGS = [*METRICS, *RATES, "train/loss", "train/d_loss", "train/grad_norm", "train/samples_per_second"]


def shown(metrics=METRICS, gradient_norm=True):
    """Title -> the tags that TensorBoard finds for the chart, which it does with ``re.match``."""
    (charts,) = layout(metrics, gradient_norm=gradient_norm).values()
    return {title: [tag for tag in TAGS if re.match(pattern, tag)] for title, (_, (pattern,)) in charts.items()}


@pytest.mark.parametrize(
    ("title", "tags"),
    [
        ("loss", ["val/loss", "train/loss", "train/d_loss"]),
        ("accuracy", ["val/accuracy", "test/accuracy"]),
        ("f1", ["val/f1/0", "val/f1/1"]),
        ("top-1 (%)", ["top-1 (%)"]),
        ("iou", ["ema/val/iou"]),
        ("learning rate", RATES),
        ("gradient norm", ["train/grad_norm"]),
    ],
)
def test_a_chart_has_what_belongs_together(title, tags):
    assert shown()[title] == tags


def test_training_comes_first_and_the_gradient_last():
    titles = list(shown())
    assert (titles[0], titles[-2:]) == ("loss", ["learning rate", "gradient norm"])


def test_a_gradient_that_nobody_measures_has_no_chart():
    assert "gradient norm" not in shown(gradient_norm=False)


def test_without_metrics_there_are_the_loss_and_the_rate():
    assert list(shown(metrics=[], gradient_norm=False)) == ["loss", "learning rate"]


@pytest.mark.parametrize(("max_iters", "text"), [(None, "finished after 2 epochs"), (9, "finished after 9 iterations")])
def test_an_end_is_told_on_the_clock_of_its_limit(max_iters, text):
    assert finished(epoch=2, iteration=9, max_iters=max_iters) == text
