"""The tags of a run in TensorBoard: which curves share a chart, and the texts."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["CYCLE", "ENDED", "chart_title", "finished", "layout"]

CYCLE = "cycle"
"""The tag of the text that shows the cycle, written when a run starts."""
ENDED = "ended"
"""The tag of the text that says why a run ended."""

LOSS = ".*loss$"
LEARNING_RATE = "train/(.*/)?lr(/.*)?$"
GRADIENT_NORM = "train/grad_norm$"
NUMBER = re.compile("(/[0-9]+)?$")


def chart_title(metric: str) -> str:
    """The title of the chart that shows a metric: the last part of its name; ``"loss"`` for every loss.

    The number of an entry of a vector does not count.

    Example:
        >>> [chart_title(name) for name in ("val/accuracy", "test/accuracy", "val/f1/0", "train/d_loss")]
        ['accuracy', 'accuracy', 'f1', 'loss']
    """
    name = NUMBER.sub("", metric).rsplit("/", 1)[-1]
    return "loss" if name.endswith("loss") else name


def layout(metrics: Iterable[str], *, gradient_norm: bool) -> dict[str, dict[str, list[object]]]:
    """The layout of the page "Custom Scalars": the charts, and the curves that share one.

    Args:
        metrics: the names of the metrics' curves, such as ``val/accuracy``; :func:`chart_title` says which share a chart.
        gradient_norm: whether the run measures the gradient norm.

    Returns:
        The argument of ``SummaryWriter.add_custom_scalars``: category -> chart -> its kind, and the patterns of its curves.

    Example:
        >>> page = layout(["val/loss", "val/accuracy", "test/accuracy"], gradient_norm=True)
        >>> list(page["overview"])
        ['loss', 'accuracy', 'learning rate', 'gradient norm']
        >>> page["overview"]["accuracy"]
        ['Multiline', ['(.*/)?accuracy(/[0-9]+)?$']]
    """
    titles = dict.fromkeys(map(chart_title, metrics))
    charts = {"loss": LOSS}
    charts |= {title: f"(.*/)?{re.escape(title)}{NUMBER.pattern}" for title in titles if title != "loss"}
    charts["learning rate"] = LEARNING_RATE
    if gradient_norm:
        charts["gradient norm"] = GRADIENT_NORM
    return {"overview": {title: ["Multiline", [pattern]] for title, pattern in charts.items()}}


def finished(epoch: int, iteration: int, max_iters: int | None) -> str:
    """The reason why a run that reached its limit ended.

    Example:
        >>> finished(epoch=3, iteration=12, max_iters=None), finished(epoch=1, iteration=1, max_iters=1)
        ('finished after 3 epochs', 'finished after 1 iteration')
    """
    number, clock = (epoch, "epoch") if max_iters is None else (iteration, "iteration")
    return f"finished after {number} {clock}{'' if number == 1 else 's'}"
