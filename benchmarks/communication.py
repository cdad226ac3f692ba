"""What an optimizer step of two processes costs over windows of 1 to 16 batches, beside what a simple model says.

usage: python benchmarks/communication.py [--quick]

The model: a step over a window of k batches takes k * (compute and agree) + update + reduce, where to agree is to tell each
other of a few integers whether to go on. Each is measured by itself, by a loop written by hand with torch alone, and the step
by a trainer under DDP, over gloo on this machine. All take turns in the same two processes, so that whatever else the machine
does disturbs them alike; medians and quartiles are shown, as ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn

from camshaft import StepEvents, create_trainer

ROOT = Path(__file__).parents[1]
WINDOWS = (1, 2, 4, 8, 16)
WIDTH, LAYERS, SAMPLES = 512, 8, 24
STEPS, ROUNDS, WARM_UP = 6, 12, 2

Batch = tuple[torch.Tensor, torch.Tensor]


def network() -> nn.Module:
    """Some 2 million parameters, the same ones on each process."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def seconds(action: Callable[[], object], times: int = WINDOWS[-1]) -> float:
    """How long an action takes where it is done again and again; the processes begin together."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - started) / times


def parts(batch: Batch) -> dict[str, Callable[[], object]]:
    """What a step is made of, by hand."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
    wishes = torch.zeros(4, dtype=torch.int64)

    def compute() -> None:
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()

    def compute_and_agree() -> None:
        compute()
        dist.all_reduce(wishes, dist.ReduceOp.MAX)

    compute()  # for there to be gradients
    return {
        "compute": compute,
        "compute and agree": compute_and_agree,
        "update": optimizer.step,
        "reduce": lambda: dist.all_reduce(gradients),
    }


class Steps:
    """A trainer whose optimizer steps are timed, from the end of one to the end of the next.

    Args:
        window: how many batches make one.
        batch: the batch that it gets, again and again.
    """

    def __init__(self, window: int, batch: Batch) -> None:
        self.batches = [batch] * (window * (STEPS + WARM_UP))
        self.ends: list[float] = []
        model = idist.auto_model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.trainer = create_trainer(model, optimizer, nn.functional.mse_loss, accumulation_steps=window)
        self.trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda: self.ends.append(time.perf_counter()))

    def measure(self) -> list[float]:
        """Seconds for each step but the first ones, in which DDP sorts its buckets."""
        self.ends = []
        self.trainer.run(self.batches, max_epochs=1)
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)][WARM_UP - 1 :]


def measure(quick: bool) -> tuple[dict[str, float], dict[int, list[float]]]:
    """The medians of the parts, and by window the lower quartile, median and upper quartile of a step, in seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(idist.get_rank())
    batch = torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, WIDTH)
    by_hand, trainers = parts(batch), {window: Steps(window, batch) for window in WINDOWS}
    pieces: dict[str, list[float]] = {name: [] for name in by_hand}
    steps: dict[int, list[float]] = {window: [] for window in WINDOWS}
    for _ in range(1 if quick else ROUNDS):
        for name, action in by_hand.items():
            pieces[name].append(seconds(action))
        for window, trainer in trainers.items():
            steps[window] += trainer.measure()
    medians = {name: statistics.median(values) for name, values in pieces.items()}
    return medians, {window: statistics.quantiles(values, n=4) for window, values in steps.items()}


def modelled(window: float, part: dict[str, float]) -> float:
    """How long a step over a window takes by the model."""
    return window * part["compute and agree"] + part["update"] + part["reduce"]


def page(part: dict[str, float], steps: dict[int, list[float]]) -> str:
    """The results as text, in units of the compute of one batch."""
    unit = part["compute"]
    lines = [
        "# What an optimizer step of two processes costs",
        "",
        "Two processes over gloo on one machine, one thread each; times in units of one batch's forward and backward pass.",
        "Written by `python benchmarks/communication.py`.",
        "",
        "| part, by hand | of one batch's compute |",
        "|---|---|",
        *(f"| {name} | {part[name] / unit:.3f} |" for name in part),
        "",
        "The model: a step over k batches takes k * (compute and agree) + update + reduce. Efficiency is the share of the time",
        "that goes into forward and backward passes.",
        "",
        "| window | step, median (quartiles) | by the model | measured / model | efficiency | by the model |",
        "|---|---|---|---|---|---|",
    ]
    for window, (low, middle, high) in steps.items():
        said = modelled(window, part)
        lines.append(
            f"| {window} | {middle / unit:.2f} ({low / unit:.2f} to {high / unit:.2f}) | {said / unit:.2f} "
            f"| {middle / said:.2f} | {window * unit / middle:.0%} | {window * unit / said:.0%} |"
        )
    return "\n".join(lines) + "\n"


def draw(part: dict[str, float], steps: dict[int, list[float]], path: Path) -> None:
    """The efficiency over the window: measured, by the model, and for other ratios of reduce to compute."""
    from matplotlib.figure import Figure

    unit = part["compute"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    windows = [2 ** (exponent / 10) for exponent in range(41)]
    for ratio in (0.25, 1, 4):
        share = [window / (window + ratio) for window in windows]
        axes.plot(windows, share, color="#9aa5b1", linewidth=1)
        axes.annotate(
            f"reduce = {ratio:g} x compute",
            (windows[-1], share[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color="#6b7580",
        )
    axes.plot(windows, [w * unit / modelled(w, part) for w in windows], color="#1f6f8b", label="the model, its parts measured")
    shares = {window: [window * unit / quartile for quartile in quartiles] for window, quartiles in steps.items()}
    low, high = ([abs(share[1] - share[end]) for share in shares.values()] for end in (2, 0))
    axes.errorbar(
        list(shares), [share[1] for share in shares.values()], yerr=[low, high], fmt="o", color="#c8102e", capsize=3,
        label="steps of a trainer, two processes (quartiles)",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(steps), [str(window) for window in steps])
    axes.set(xlabel="batches per optimizer step", ylabel="share of the time in forward and backward", ylim=(0, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Starts two processes, which measure; the first one prints, and writes the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, and no files")
    quick = parser.parse_args().quick
    if not dist.is_torchelastic_launched():
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        sys.exit(subprocess.run([*torchrun, __file__, *sys.argv[1:]], check=False).returncode)
    idist.initialize("gloo")
    part, steps = measure(quick)
    if idist.get_rank() == 0:
        text = page(part, steps)
        print(text)
        if not quick:
            (ROOT / "benchmarks/results/communication.md").write_text(text)
            draw(part, steps, ROOT / "docs/images/communication.png")
    idist.finalize()


if __name__ == "__main__":
    main()
