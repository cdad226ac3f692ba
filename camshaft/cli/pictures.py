"""A run's curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camshaft.checkpoints.text import printable
from camshaft.cli.curves import Curves
from camshaft.cli.run import Run
from camshaft.tensorboard_tags import chart_title

__all__ = ["draw_run", "panels"]

MOST_PANELS = 40
"""The largest number of panels in a picture."""


def panels(run: Run) -> dict[str, Curves]:
    """The curves that share a panel, by its title: as in TensorBoard, with the learning rates last.

    Example:
        >>> curves = {"train/loss": [], "val/loss": [], "val/accuracy": []}
        >>> {title: list(names) for title, names in panels(Run(Path("."), metrics=curves)).items()}
        {'loss': ['train/loss', 'val/loss'], 'accuracy': ['val/accuracy']}
    """
    found: dict[str, dict[str, Any]] = {"loss": {}}
    for name, curve in run.metrics.items():
        found.setdefault(chart_title(name), {})[name] = curve
    found["learning rate"] = dict(run.learning_rates)
    return {title: curves for title, curves in found.items() if curves}


def plain_title(text: str) -> str:
    """A text as it is: matplotlib would read ``$`` as the beginning of a formula."""
    return printable(text, limit=100).replace("$", r"\$")


def draw_run(run: Run, path: Path) -> None:
    """Draws a run's metrics and learning rates over its optimizer steps.

    Args:
        run: the run.
        path: the file of the picture; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        OSError: if the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plotting needs matplotlib: pip install matplotlib") from None
    shown = dict(list(panels(run).items())[:MOST_PANELS])
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.5 * columns, 3 * rows), layout="constrained")
    figure.suptitle(plain_title(str(run.path)))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (title, curves) in zip(axes, shown.items(), strict=False):
        for name, curve in sorted(curves.items()):
            marker = "o" if len(curve) == 1 else None
            panel.plot(
                [point.step for point in curve], [point.value for point in curve], label=plain_title(name), marker=marker
            )
        panel.set(title=plain_title(title), xlabel="optimizer step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend()
    for empty in axes[len(shown) :]:
        empty.set_axis_off()
    figure.savefig(path, dpi=120)
