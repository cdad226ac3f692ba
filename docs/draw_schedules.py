"""Draws what some schedulers of torch do: `python docs/draw_schedules.py` writes docs/images/schedules.png."""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch.optim import lr_scheduler as schedulers

from camshaft import LRHistory

STEPS = 200
COLOR, GREY = "#2666a8", "#66727f"


def warm_up_then_cosine(optimizer):
    warm_up = schedulers.LinearLR(optimizer, start_factor=0.01, total_iters=20)
    cosine = schedulers.CosineAnnealingLR(optimizer, T_max=STEPS - 20)
    return schedulers.SequentialLR(optimizer, [warm_up, cosine], milestones=[20])


SCHEDULES = {
    "StepLR": lambda optimizer: schedulers.StepLR(optimizer, step_size=50, gamma=0.5),
    "MultiStepLR": lambda optimizer: schedulers.MultiStepLR(optimizer, milestones=[100, 160], gamma=0.2),
    "ExponentialLR": lambda optimizer: schedulers.ExponentialLR(optimizer, gamma=0.98),
    "PolynomialLR": lambda optimizer: schedulers.PolynomialLR(optimizer, total_iters=STEPS, power=2),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=30, T_mult=2),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=1.0, total_steps=STEPS),
    "SequentialLR (LinearLR, cosine)": warm_up_then_cosine,
}


def draw():
    figure = Figure(figsize=(12.4, 4.8), layout="constrained", facecolor="white")
    for axes, (name, make) in zip(figure.subplots(2, 4, sharex=True, sharey=True).flat, SCHEDULES.items(), strict=True):
        scheduler = make(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
        steps, rates = zip(*LRHistory.simulate(scheduler, STEPS)["lr"], strict=True)
        axes.plot(steps, rates, color=COLOR, lw=2, drawstyle="steps-post")
        axes.fill_between(steps, rates, color=COLOR, alpha=0.1, step="post", lw=0)
        axes.set_title(name, size=10.5)
        axes.set(ylim=(0, 1.08), xlim=(0, STEPS))
        axes.grid(alpha=0.25)
        axes.tick_params(colors=GREY, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("optimizer step", size=10.5, color=GREY)
    figure.supylabel("learning rate", size=10.5, color=GREY)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "schedules.png")
    out = parser.parse_args().out
    mpl.rcParams["font.family"] = "DejaVu Sans"
    draw().savefig(out, dpi=110)


if __name__ == "__main__":
    main()
