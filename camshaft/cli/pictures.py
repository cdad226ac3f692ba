"""A run's curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camshaft.cli.curves import Curves
from camshaft.cli.run import Run

__all__ = ["draw_run", "panels"]


def panels(run: Run) -> dict[str, Curves]:
    """The curves that are drawn together, by the title of their panel.

    Losses share one, whatever they belong to; so do metrics of one name (``val/accuracy`` and ``test/accuracy``), and so do
    the learning rates, which come last.

    Example:
        >>> curves = {"train/loss": [], "val/loss": [], "val/accuracy": []}
        >>> {title: list(names) for title, names in panels(Run(Path("."), metrics=curves)).items()}
        {'loss': ['train/loss', 'val/loss'], 'accuracy': ['val/accuracy']}
    """
    found: dict[str, dict[str, Any]] = {"loss": {}}
    for name, curve in run.metrics.items():
        leaf = name.rsplit("/", 1)[-1]
        found.setdefault("loss" if leaf.endswith("loss") else leaf, {})[name] = curve
    found["learning rate"] = dict(run.learning_rates)
    return {title: curves for title, curves in found.items() if curves}


def draw_run(run: Run, path: Path) -> None:
    """Draws a run's metrics and learning rates over its optimizer steps.

    Args:
        run: the run.
        path: where the picture goes; its ending chooses the format.

    Raises:
        ModuleNotFoundError: if matplotlib isn't installed.
        OSError: if the picture can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plotting needs matplotlib: pip install matplotlib") from None
    shown = panels(run)
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.5 * columns, 3 * rows), layout="constrained")
    figure.suptitle(str(run.path))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (title, curves) in zip(axes, shown.items(), strict=False):
        for name, curve in sorted(curves.items()):
            marker = "o" if len(curve) == 1 else None
            panel.plot([point.step for point in curve], [point.value for point in curve], label=name, marker=marker)
        panel.set(title=title, xlabel="optimizer step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend()
    for empty in axes[len(shown) :]:
        empty.set_axis_off()
    figure.savefig(path, dpi=120)
