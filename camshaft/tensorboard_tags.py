"""What TensorBoard shows of a run besides its curves: the page that has them together, and how the run ended."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["CYCLE", "ENDED", "finished", "layout"]

CYCLE = "cycle"
"""The text that shows the cycle, written when a run begins."""
ENDED = "ended"
"""The text that says why a run ended."""

LOSS = ".*loss$"
LEARNING_RATE = "train/(.*/)?lr(/.*)?$"
GRADIENT_NORM = "train/grad_norm$"
NUMBER = re.compile("(/[0-9]+)?$")


def layout(metrics: Iterable[str], *, gradient_norm: bool) -> dict[str, dict[str, list[object]]]:
    """The page "Custom Scalars": what belongs together in one chart, in the order in which one looks at it.

    Args:
        metrics: the names of the metrics' curves, such as ``val/accuracy``. Those with one last part share a chart; a number
            behind it, as the entries of a vector have, doesn't count.
        gradient_norm: whether the run measures it.

    Returns:
        What ``SummaryWriter.add_custom_scalars`` takes: category -> chart -> its kind, and the patterns of its curves.

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
    """How a run that nothing has stopped ended.

    Example:
        >>> finished(epoch=3, iteration=12, max_iters=None), finished(epoch=1, iteration=1, max_iters=1)
        ('finished after 3 epochs', 'finished after 1 iteration')
    """
    number, clock = (epoch, "epoch") if max_iters is None else (iteration, "iteration")
    return f"finished after {number} {clock}{'' if number == 1 else 's'}"
