"""Measures the time of an optimizer step of two processes, for windows of 1 to 16 batches, and compares it with a model.

usage: python benchmarks/communication.py [--quick]

The model: a step over a window of k batches takes k * (compute + requests) + update + reduce. "Requests" is the all-reduce of a
few integers by which the ranks share requests to stop. Each part is measured alone, in a loop written with torch only; the step
is measured in a trainer under DDP, over gloo on this machine. All measurements alternate in the same two processes, so that
other work on the machine affects them equally. The results are medians and quartiles, as ratios.
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
    """A network of about 2 million parameters, the same on each rank."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def seconds(action: Callable[[], object], times: int = WINDOWS[-1]) -> float:
    """The mean duration of an action that is repeated, in seconds; the ranks start at the same time."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - started) / times


def parts(batch: Batch) -> dict[str, Callable[[], object]]:
    """The parts of a step, written with torch only."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
    requests = torch.zeros(4, dtype=torch.int64)

    def compute() -> None:
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()

    def compute_and_share_requests() -> None:
        compute()
        dist.all_reduce(requests, dist.ReduceOp.MAX)

    compute()  # makes the gradients that update needs
    return {
        "compute": compute,
        "compute + requests": compute_and_share_requests,
        "update": optimizer.step,
        "reduce": lambda: dist.all_reduce(gradients),
    }


class Steps:
    """A trainer that records the time at the end of each optimizer step.

    Args:
        window: the number of batches in a step.
        batch: the batch, which is repeated.
    """

    def __init__(self, window: int, batch: Batch) -> None:
        self.batches = [batch] * (window * (STEPS + WARM_UP))
        self.ends: list[float] = []
        model = idist.auto_model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.trainer = create_trainer(model, optimizer, nn.functional.mse_loss, accumulation_steps=window)
        self.trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda: self.ends.append(time.perf_counter()))

    def measure(self) -> list[float]:
        """The seconds of each step, without the first ones, in which DDP rebuilds its buckets."""
        self.ends = []
        self.trainer.run(self.batches, max_epochs=1)
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)][WARM_UP - 1 :]


def measure(quick: bool) -> tuple[dict[str, float], dict[int, list[float]]]:
    """The median of each part, and the quartiles of a step for each window, in seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(idist.get_rank())
    batch = torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, WIDTH)
    actions, trainers = parts(batch), {window: Steps(window, batch) for window in WINDOWS}
    durations: dict[str, list[float]] = {name: [] for name in actions}
    steps: dict[int, list[float]] = {window: [] for window in WINDOWS}
    for _ in range(1 if quick else ROUNDS):
        for name, action in actions.items():
            durations[name].append(seconds(action))
        for window, trainer in trainers.items():
            steps[window] += trainer.measure()
    medians = {name: statistics.median(values) for name, values in durations.items()}
    return medians, {window: statistics.quantiles(values, n=4) for window, values in steps.items()}


def predicted(window: float, part: dict[str, float]) -> float:
    """The duration of a step over a window according to the model."""
    return window * part["compute + requests"] + part["update"] + part["reduce"]


def page(part: dict[str, float], steps: dict[int, list[float]]) -> str:
    """The results as Markdown, in units of the compute of one batch."""
    unit = part["compute"]
    lines = [
        "# The cost of an optimizer step of two processes",
        "",
        "Two processes over gloo on one machine, one thread each; times in units of one batch's forward and backward pass.",
        "Written by `python benchmarks/communication.py`.",
        "",
        "| part | relative to compute |",
        "|---|---|",
        *(f"| {name} | {part[name] / unit:.3f} |" for name in part),
        "",
        "The model: a step over k batches takes k * (compute + requests) + update + reduce. Efficiency is the share of the",
        "time in forward and backward passes.",
        "",
        "| window | step, median (quartiles) | model | measured / model | efficiency | efficiency, model |",
        "|---|---|---|---|---|---|",
    ]
    for window, (low, middle, high) in steps.items():
        expected = predicted(window, part)
        lines.append(
            f"| {window} | {middle / unit:.2f} ({low / unit:.2f} to {high / unit:.2f}) | {expected / unit:.2f} "
            f"| {middle / expected:.2f} | {window * unit / middle:.0%} | {window * unit / expected:.0%} |"
        )
    return "\n".join(lines) + "\n"


def draw(part: dict[str, float], steps: dict[int, list[float]], path: Path) -> None:
    """Plots the efficiency over the window: measured, by the model, and for other ratios of reduce to compute."""
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
    axes.plot(windows, [w * unit / predicted(w, part) for w in windows], color="#1f6f8b", label="the model, its parts measured")
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
    """Starts two processes, which measure. Rank 0 prints the results, and writes the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run one round, and write no files")
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
