"""Draws the cycle of a training step: `python docs/draw_cycle.py` writes docs/images/cycle.svg."""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from camshaft import Events, StepEvents

INK, GREY, LINE, PAPER = "#1f2933", "#66727f", "#c3cbd3", "#ffffff"
BATCH, WINDOW, SKIPPED = "#2666a8", "#bf4a30", "#8a6a2f"
MONO = ["DejaVu Sans Mono", "monospace"]
WIDTH, HEIGHT = 1.22, 1.0
"""The half axes of the ring."""

STOPS = {  # the angle on the ring, and what a handler may do
    StepEvents.FORWARD_STARTED: (52, "state.x and state.y are on the device"),
    StepEvents.FORWARD_COMPLETED: (17, "state.y_pred, state.loss: add a penalty,\nreplace the loss"),
    StepEvents.BACKWARD_STARTED: (-17, "the loss is final"),
    StepEvents.BACKWARD_COMPLETED: (-52, "this batch's contribution is in .grad"),
    StepEvents.GRADIENTS_READY: (232, ".grad is the window's gradient: change it;\nNonFiniteGuard, GradientClipping"),
    StepEvents.GRADIENTS_CLIPPED: (197, "state.grad_norm, the norm before clipping"),
    StepEvents.OPTIMIZER_STEP_STARTED: (163, "the last event\nbefore the weights change"),
    StepEvents.OPTIMIZER_STEP_COMPLETED: (128, "LRHistory, ExponentialMovingAverage,\nyour handlers, LRScheduling"),
}
WORK = {34.5: "forward, loss\n(autocast)", -34.5: "backward", 270: "unscale, normalize", 214.5: "clip", 145.5: "step"}
"""The operations between two events, by the angle of their labels."""
AROUND = (
    (Events.STARTED, "logs open"),
    (Events.EPOCH_STARTED, ""),
    (None, "the cycle above,\nonce per batch"),
    (Events.EPOCH_COMPLETED, "evaluate, schedule by metric, your handlers,\nearly stopping, log, save"),
    (Events.COMPLETED, "the last save,\nlogs close"),
)


def at(angle, scale=1.0):
    return scale * WIDTH * np.cos(np.radians(angle)), scale * HEIGHT * np.sin(np.radians(angle))


def arrow(axes, points, color, style="-", bend=0.0, width=1.8):
    axes.add_patch(
        FancyArrowPatch(
            *points,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>,head_length=7,head_width=3.6",
            color=color,
            lw=width,
            linestyle=style,
            shrinkA=9,
            shrinkB=2,
            zorder=3,
        )
    )


def half_ring(axes, first, last, color):
    """Half of the ring, clockwise, with arrows that show the direction."""
    axes.plot(*at(np.linspace(first, last, 200)), lw=19, color=color, alpha=0.15, solid_capstyle="round")
    for angle in (first - 14, (first + last) / 2, last + 14):
        arrow(axes, (at(angle + 2), at(angle - 2)), color)


def dot(axes, place, color):
    axes.plot(*place, "o", ms=12, mfc=color, mec=PAPER, mew=2.2, zorder=5)


def stop(axes, event, angle, note, color):
    """An event on the ring: its dot, its name, and what a handler may do."""
    dot(axes, at(angle), color)
    side = 1 if np.cos(np.radians(angle)) > 0 else -1
    slope = np.sin(np.radians(angle))
    x, y = at(angle)
    x += side * (0.21 if slope > 0.5 else 0.13)  # below its name the ring is wider
    y += 0.11 * slope + (0.03 if abs(slope) < 0.5 and "\n" in note else 0.0)
    align = "left" if side > 0 else "right"
    axes.text(x, y, event.name, family=MONO, size=13, weight="bold", color=color, ha=align, va="center")
    axes.text(x, y - 0.065, note, size=11, color=INK, ha=align, va="top", linespacing=1.3)


def shortcuts(axes):
    """The two shortcuts: a window that is still open, and a step that is skipped."""
    arrow(axes, (at(-52), at(80, 0.93)), BATCH, "--", -0.06, 1.4)
    axes.text(0.76, 0.0, "window still open:\nthe next batch", size=11, color=BATCH, ha="center", va="center", linespacing=1.3)
    place = (-0.3, 0.27)
    arrow(axes, (at(197), place), SKIPPED, "--", -0.36, 1.4)
    arrow(axes, (place, at(100, 0.93)), SKIPPED, "--", -0.1, 1.4)
    dot(axes, place, SKIPPED)
    name = StepEvents.OPTIMIZER_STEP_SKIPPED.name
    axes.text(-0.28, 0.1, name, family=MONO, size=11.5, weight="bold", color=SKIPPED, ha="center", va="center")
    note = "the scaler or the guard skips\nthe step: schedule, clock and\naverage do not change"
    axes.text(-0.28, 0.035, note, size=10, color=INK, ha="center", va="top", linespacing=1.3)


def clocks(axes):
    for side, color, title, text in (
        (1, BATCH, "once per batch", "clock: state.iteration"),
        (-1, WINDOW, "once per window", "clock: state.optimizer_step"),
    ):
        align = "left" if side > 0 else "right"
        axes.text(side * 0.96, 1.2, title, size=14, weight="bold", color=color, ha=align, va="center")
        axes.text(side * 0.96, 1.11, text, size=11, color=GREY, ha=align, va="center")


def strip(axes):
    """The events around the cycle: those of the run and its epochs."""
    lefts, y = (-2.55, -1.85, -0.92, 0.07, 1.77), -1.4
    widths = (0.62, 0.85, 0.91, 1.62, 0.78)
    for (event, note), left, width in zip(AROUND, lefts, widths, strict=True):
        box = FancyBboxPatch((left, y - 0.13), width, 0.3, boxstyle="round,pad=0.0,rounding_size=0.05", fc="#f3f5f7", ec=LINE)
        axes.add_patch(box)
        middle = left + width / 2
        if event is None:
            axes.text(middle, y + 0.02, note, size=10, color=GREY, ha="center", va="center", linespacing=1.25)
            continue
        height = y + (0.1 if "\n" in note else 0.06 if note else 0.02)
        axes.text(middle, height, event.name, family=MONO, size=10, weight="bold", color=INK, ha="center", va="center")
        axes.text(middle, height - 0.06, note, size=9, color=GREY, ha="center", va="top", linespacing=1.2)
    for left, right in zip(np.add(lefts, widths)[:-1], lefts[1:], strict=True):
        arrow(axes, ((left - 0.04, y + 0.02), (right, y + 0.02)), GREY, width=1.2)


def draw():
    figure = Figure(figsize=(12.8, 7.0), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-2.7, 2.7), ylim=(-1.65, 1.303), aspect="equal")
    axes.axis("off")
    half_ring(axes, 81, -81, BATCH)
    half_ring(axes, 261, 99, WINDOW)
    for event, (angle, note) in STOPS.items():
        stop(axes, event, angle, note, BATCH if angle < 90 else WINDOW)
    for angle, text in WORK.items():
        inside = {270: 0.87, -34.5: 0.84}.get(angle, 0.79)
        axes.text(*at(angle, inside), text, size=10.5, color=GREY, style="italic", ha="center", va="center", linespacing=1.2)
    for height, text in ((1.0, "batch"), (-1.0, "window\nclosed")):
        axes.text(0, height, text, size=10.5, color=GREY, style="italic", ha="center", va="center", linespacing=1.1)
    shortcuts(axes)
    clocks(axes)
    strip(axes)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "cycle.svg")
    out = parser.parse_args().out
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "camshaft", "font.family": "DejaVu Sans"})
    draw().savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
