"""How TensorBoard tags are grouped into charts, and how the end of a run is described."""

import re

import pytest

from camshaft.tensorboard_tags import finished, layout

METRICS = ["val/loss", "val/accuracy", "val/f1/0", "val/f1/1", "test/accuracy", "top-1 (%)", "ema/val/iou"]
RATES = ["train/lr", "train/lr/head", "train/generator/lr"]
TAGS = [*METRICS, *RATES, "train/loss", "train/d_loss", "train/grad_norm", "train/samples_per_second"]


def tags_by_chart(metrics=METRICS, gradient_norm=True):
    """The tags of each chart by its title, matched with ``re.match`` as TensorBoard does."""
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
def test_a_chart_contains_related_tags(title, tags):
    assert tags_by_chart()[title] == tags


def test_the_loss_is_first_and_the_gradient_norm_is_last():
    titles = list(tags_by_chart())
    assert (titles[0], titles[-2:]) == ("loss", ["learning rate", "gradient norm"])


def test_there_is_no_chart_for_a_gradient_norm_that_is_not_measured():
    assert "gradient norm" not in tags_by_chart(gradient_norm=False)


def test_without_metrics_there_are_charts_for_the_loss_and_the_learning_rate():
    assert list(tags_by_chart(metrics=[], gradient_norm=False)) == ["loss", "learning rate"]


@pytest.mark.parametrize(("max_iters", "text"), [(None, "finished after 2 epochs"), (9, "finished after 9 iterations")])
def test_the_end_of_a_run_is_described_in_the_unit_of_its_limit(max_iters, text):
    assert finished(epoch=2, iteration=9, max_iters=max_iters) == text
