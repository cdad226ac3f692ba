"""The tags of a run in TensorBoard: which curves share a chart, and the texts."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["CYCLE", "ENDED", "finished", "layout"]

CYCLE = "cycle"
"""The tag of the text that shows the cycle, written when a run starts."""
ENDED = "ended"
"""The tag of the text that says why a run ended."""

LOSS = ".*loss$"
LEARNING_RATE = "train/(.*/)?lr(/.*)?$"
GRADIENT_NORM = "train/grad_norm$"
NUMBER = re.compile("(/[0-9]+)?$")


def layout(metrics: Iterable[str], *, gradient_norm: bool) -> dict[str, dict[str, list[object]]]:
    """The layout of the page "Custom Scalars": the charts, and the curves that share one.

    Args:
        metrics: the names of the metrics' curves, such as ``val/accuracy``. Names with the same
            last part share a chart; the number of an entry of a vector does not count.
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
    names = dict.fromkeys(NUMBER.sub("", metric).rsplit("/", 1)[-1] for metric in metrics)
    charts = {"loss": LOSS}
    charts |= {name: f"(.*/)?{re.escape(name)}{NUMBER.pattern}" for name in names if not name.endswith("loss")}
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
