"""Plots many learning-rate schedules before training, and one that depends on a metric, after a real run.

    python examples/lr_schedules.py      # a few seconds; --quick for a shorter run

`LRHistory.simulate` computes the rates of a scheduler without changing it or its optimizer. `ReduceLROnPlateau` depends on the
validation loss, so `LRHistory` records the rates that the steps of a run have used.
"""

import argparse
from pathlib import Path

import torch
from ignite.metrics import Loss
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, TensorDataset, random_split

from camshaft import Events, create_evaluator, create_trainer, seed_everything
from camshaft.handlers import Evaluation, LRHistory, LRScheduling

STEPS = 400
WARMUP = 60


def warm_up(o):
    return lrs.LinearLR(o, 0.02, total_iters=WARMUP)


def then_cosine(o):
    return lrs.SequentialLR(o, [warm_up(o), lrs.CosineAnnealingLR(o, STEPS - WARMUP)], milestones=[WARMUP])


SCHEDULES = {
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, total_iters=100),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.05, total_iters=150),
    "StepLR": lambda o: lrs.StepLR(o, 80, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [200, 320], gamma=0.3),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.99),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, STEPS, power=2),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.6 if step % 57 == 0 else 1.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 58, T_mult=2),
    "CyclicLR, triangular2": lambda o: lrs.CyclicLR(o, 0.05, 1.0, 50, mode="triangular2", cycle_momentum=False),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 1.0, total_steps=STEPS, cycle_momentum=False),
    "LambdaLR: inverse root": lambda o: lrs.LambdaLR(o, lambda n: min((n + 1) / WARMUP, (WARMUP / (n + 1)) ** 0.5)),
    "LambdaLR: trapezium": lambda o: lrs.LambdaLR(o, lambda n: min((n + 1) / WARMUP, 1, (STEPS - n) / 150)),
    "SequentialLR: warm-up, cosine": then_cosine,
    "ChainedScheduler: product": lambda o: lrs.ChainedScheduler([warm_up(o), lrs.ExponentialLR(o, 0.992)], optimizer=o),
}


def real_run(epochs):
    """Trains on digits with a schedule that follows the validation loss; returns the rates and the losses by optimizer step."""
    pixels, digits = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits))
    train_set, val_set = random_split(dataset, [0.8, 0.2])
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    trainer = create_trainer(model, optimizer, nn.CrossEntropyLoss())
    evaluator = create_evaluator(model, metrics={"loss": Loss(nn.CrossEntropyLoss())})
    Evaluation(evaluator, DataLoader(val_set, 360)).attach(trainer)
    LRScheduling(lrs.ReduceLROnPlateau(optimizer, factor=0.5, patience=2), metric="val/loss").attach(trainer)
    history, losses = LRHistory().attach(trainer), []

    @trainer.on(Events.EPOCH_COMPLETED)
    def note(engine):
        losses.append((engine.state.optimizer_step, engine.state.metrics["val/loss"]))

    trainer.run(DataLoader(train_set, 32, shuffle=True), max_epochs=epochs)
    return history.history["lr"], losses


def draw_curve(axes, points, title, color):
    steps, rates = zip(*points, strict=True)
    axes.fill_between(steps, rates, step="post", color=color, alpha=0.18, linewidth=0)
    axes.plot(steps, rates, color=color, linewidth=1.8, drawstyle="steps-post")
    axes.set_title(title, fontsize=10, loc="left", color="0.2")
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(0, 1.08 * max(rates))
    axes.tick_params(labelsize=8, color="0.7", labelcolor="0.4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lr_schedules"))
    parser.add_argument("--quick", action="store_true", help="a real run of five epochs instead of thirty")
    args = parser.parse_args()
    seed_everything(0)
    torch.set_num_threads(1)

    figure = Figure(figsize=(13, 10), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3, 1.35])
    above.suptitle("Learning rates ahead of time: LRHistory.simulate(scheduler, 400)", fontsize=13, color="0.2")
    figure.get_layout_engine().set(h_pad=0.08, hspace=0.04)
    colors = colormaps["plasma"](torch.linspace(0.0, 0.82, len(SCHEDULES)).numpy())
    for axes, (title, make), color in zip(above.subplots(3, 5).flat, SCHEDULES.items(), colors, strict=True):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        draw_curve(axes, LRHistory.simulate(make(optimizer), STEPS)["lr"], title, color)

    rates, losses = real_run(epochs=5 if args.quick else 30)
    axes = below.subplots()
    draw_curve(axes, rates, "ReduceLROnPlateau, as a real run has used it", "tab:blue")
    axes.set_xlabel("optimizer step", fontsize=9, color="0.3")
    axes.set_ylabel("learning rate", fontsize=9, color="tab:blue")
    beside = axes.twinx()
    beside.plot(*zip(*losses, strict=True), color="tab:red", marker="o", markersize=3, linewidth=1)
    beside.set_ylabel("validation loss", fontsize=9, color="tab:red")
    beside.tick_params(labelsize=8, color="0.7", labelcolor="0.4")
    beside.spines[["top", "left", "right", "bottom"]].set_visible(False)

    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "lr_schedules.png", dpi=110)
    print(f"the real run used the rates {', '.join(f'{rate:.1e}' for rate in dict.fromkeys(rate for _, rate in rates))}")
    print(f"{len(SCHEDULES)} schedules ahead of time and the real run: {args.out / 'lr_schedules.png'}")


if __name__ == "__main__":
    main()
