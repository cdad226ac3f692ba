"""What a training loop costs beside its step: camshaft, its peers, and the loop that one would write by hand.

Each comparison runs in a process of its own: the contestants train from the same weights on the same batches, taking turns
round by round, and what is reported is the median over the rounds of the difference to the loop beside it, in microseconds
per iteration, with its quartiles. At the end the weights are compared.

The clock is the processor time of the whole process, all threads included: with one thread for the sums that is the time on
a machine with nothing else to do, and other programs disturb it little. ``--clock wall`` takes the time on the wall.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py           # all of it, four minutes
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --quick   # fewer rounds
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --only nothing --only large
    python benchmarks/overhead.py --device cuda               # on a GPU, by the time on the wall, into results/gpu.md
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, os.fspath(HERE.parent))  # the package beside this folder, installed or not

import torch  # noqa: E402
from contestants import CONTESTANTS, COUNTS, GAMES, HELD_BACK, NEEDS, make_game, make_task  # noqa: E402


def when_done() -> float:
    """The time on the wall when the device has nothing left to do."""
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter, "device": when_done}
WARM_UP = 2
"""Rounds that aren't counted."""


@dataclass(frozen=True)
class Comparison:
    """Loops that take turns in one process; what is reported is each one's difference to the first."""

    scenario: str
    baseline: str
    rivals: tuple[str, ...]
    size: str = "tiny"
    batches: int = 100
    rounds: int = 21
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """One contestant's cost beside the baseline, in microseconds per iteration."""

    scenario: str
    name: str
    baseline: str
    per_iteration: float
    low: float
    median: float
    high: float
    ratio: float
    weights: str


PEERS = ("blog template", "Ignite", "Fabric", "Poutyne", "skorch", "TNT", "Accelerate", "Lightning", "Keras")
PEERS += ("fastai", "Composer")
SCENARIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nothing": ("bare loop", ("camshaft", *PEERS)),
    "accumulation": (
        "bare loop, accumulating",
        ("camshaft, accumulating", "Ignite, accumulating", "Accelerate, accumulating", "Lightning, accumulating"),
    ),
    "clipping": (
        "bare loop, clip + schedule + history",
        ("camshaft, clip + schedule + history", "Lightning, clip + schedule"),
    ),
    "logging": (
        "bare loop",
        (
            "camshaft, TensorBoard + bar",
            "bare loop, TensorBoard + bar",
            "Ignite, TensorBoard + bar",
            "Lightning, TensorBoard + bar",
        ),
    ),
    "everything": ("bare loop, everything", ("camshaft, everything",)),
}


def comparisons() -> Iterator[Comparison]:
    """Every process of the benchmark, in the order of the table."""
    for scenario, (baseline, rivals) in SCENARIOS.items():
        for rival in rivals:
            # a writer's opening lines are written behind the first iterations: more of them, so that they don't count
            longer = {"batches": 400, "rounds": 11} if scenario in ("logging", "everything") else {}
            yield Comparison(scenario, baseline, (rival,), **longer)
    for library, baseline in (("camshaft", "camshaft"), ("Ignite", "Ignite")):
        for kind in ("running", "sleeping"):
            rivals = tuple(f"{library}, {count} {kind}" for count in COUNTS)
            yield Comparison(f"handlers {kind}", baseline, rivals)
    for game in GAMES:
        yield Comparison("game", f"bare loop, {game}", (f"camshaft, {game}",), size="game")
    for rival in ("camshaft", "blog template", "Ignite"):
        yield Comparison("large", "bare loop", (rival,), size="large", batches=16)
    yield Comparison(
        "large, everything", "bare loop, everything", ("camshaft, everything",), size="large", batches=100, rounds=11
    )


def comparisons_on(device: str) -> Iterator[Comparison]:
    """Every process of the benchmark on a GPU."""
    for size in ("tiny", "wide"):
        for kernels in ("", ", fused"):
            rivals = (
                "camshaft",
                "camshaft, prefetched",
                "camshaft, compiled",
                "camshaft, captured",
                "blog template",
                "bare loop, captured",
                "Ignite",
            )
            for rival in rivals:
                yield Comparison(f"gpu, {size}{kernels}", "bare loop", (rival,), size=size + kernels, device=device)
        for rival in ("camshaft, TF32", "camshaft, bf16"):
            yield Comparison(f"gpu, {size}", "bare loop", (rival,), size=size, device=device)
        for rival in ("camshaft, everything", "camshaft, everything, captured", "camshaft, TensorBoard + bar"):
            baseline, kind = "bare loop, " + rival.split(", ")[1], f"{size}, fused" if "captured" in rival else size
            yield Comparison(f"gpu, {size}, logged", baseline, (rival,), size=kind, batches=400, rounds=11, device=device)
    rivals = (
        "camshaft",
        "camshaft, channels last",
        "camshaft, TF32",
        "camshaft, bf16",
        "camshaft, compiled",
        "camshaft, captured",
    )
    for rival in rivals:
        yield Comparison("gpu, images", "bare loop", (rival,), size="images", device=device)


# -- one comparison, in a process of its own ------------------------------------------------------------------------------


def measure(comparison: Comparison, clock: str) -> list[Result]:
    """Lets the contestants take turns, and compares their times and their weights."""
    names = (comparison.baseline, *comparison.rivals)
    with tempfile.TemporaryDirectory() as folder:
        tasks, rounds = [], []
        for number, name in enumerate(names):
            own, clock_ = Path(folder) / str(number), CLOCKS[clock]
            if comparison.size == "game":
                task = make_game(comparison.batches, own, clock_)
            else:
                task = make_task(comparison.size, comparison.batches, own, clock_, comparison.device)
            tasks.append(task)
            rounds.append(CONTESTANTS[name](task))
        times: list[list[float]] = [[] for _ in names]
        for turn in range(WARM_UP + comparison.rounds):
            order = list(range(len(names)))[:: 1 if turn % 2 else -1]  # so that going first is nobody's privilege
            for number in order:
                gc.collect()  # what one has left behind is not the next one's cost
                rounds[number]()
                if turn >= WARM_UP:
                    times[number].append(tasks[number].batches.per_iteration)
    base, results = times[0], []
    for name, own, task in zip(names[1:], times[1:], tasks[1:], strict=True):
        low, median, high = statistics.quantiles([b - a for a, b in zip(base, own, strict=True)], n=4)
        ratio = statistics.median(b / a for a, b in zip(base, own, strict=True))
        weights = compare_weights(tasks[0].model, task.model)
        at = statistics.median(base)
        results.append(Result(comparison.scenario, name, names[0], at, low, median, high, ratio, weights))
    return results


def compare_weights(one: torch.nn.Module, other: torch.nn.Module) -> str:
    """Whether two models have ended with the same weights, in a word or a number."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    if all(torch.equal(a, b) for a, b in pairs):
        return "equal"
    return f"off by {max(float((a - b).abs().max()) for a, b in pairs):.0e}"


# -- all of them ----------------------------------------------------------------------------------------------------------


def missing(comparison: Comparison) -> str | None:
    """Which module isn't installed that a contestant needs, and why, where that is known."""
    needed = [NEEDS[name] for name in (comparison.baseline, *comparison.rivals)]
    module = next((module for module in needed if importlib.util.find_spec(module) is None), None)
    return module and f"{module} is not installed" + (f": {HELD_BACK[module]}" if module in HELD_BACK else "")


def run_apart(comparison: Comparison, clock: str) -> list[Result] | str:
    """Measures in a fresh process; gives the last line of what it complained about where it fails."""
    command = [sys.executable, __file__, "--clock", clock, "--comparison", json.dumps(asdict(comparison))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "0.1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no word"])[-1]
    return [Result(**line) for line in json.loads(done.stdout.splitlines()[-1])]


def run_steadily(comparison: Comparison, clock: str, attempts: int) -> list[Result] | str:
    """Measures again while the quartiles are far apart, and keeps the attempt in which they were nearest."""
    best: list[Result] | str = "not run"
    for _ in range(attempts):
        results = run_apart(comparison, clock)
        if isinstance(results, str):
            return results
        if isinstance(best, str) or spread(results) < spread(best):
            best = results
        if spread(best) < max(4.0, 0.02 * best[0].per_iteration):
            break
    return best


def spread(results: list[Result]) -> float:
    """The widest distance between the quartiles."""
    return max(result.high - result.low for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="nine rounds each, measured once")
    parser.add_argument("--attempts", type=int, default=2, help="how often to measure while the quartiles are far apart")
    parser.add_argument("--only", action="append", metavar="SCENARIO", help="may be given several times")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--device", help="a GPU, such as cuda; by default the CPU")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "images" / "benchmark.png")
    parser.add_argument("--comparison", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.comparison:
        torch.set_num_threads(1)
        found = measure(Comparison(**json.loads(arguments.comparison)), arguments.clock)
        print(json.dumps([asdict(result) for result in found]))
        return

    from report import draw, write

    results: list[Result] = []
    skipped: dict[str, Any] = {}
    if arguments.device is not None:
        arguments.clock = "device"
    for comparison in comparisons() if arguments.device is None else comparisons_on(arguments.device):
        if arguments.only and comparison.scenario not in arguments.only:
            continue
        if arguments.quick:
            comparison = Comparison(**asdict(comparison) | {"rounds": 9})
        attempts = 1 if arguments.quick else arguments.attempts
        found = missing(comparison) or run_steadily(comparison, arguments.clock, attempts)
        if isinstance(found, str):
            skipped[comparison.rivals[0]] = found
            print(f"{comparison.scenario:18} {comparison.rivals[0]:38} skipped: {found}", flush=True)
            continue
        results += found
        for result in found:
            print(
                f"{result.scenario:18} {result.name:38} {result.median:8.1f} [{result.low:.1f}, {result.high:.1f}] "
                f"of {result.per_iteration:.0f} us, x{result.ratio:.3f}, weights {result.weights}",
                flush=True,
            )
        write(results, skipped, arguments.results, arguments.clock)  # each time: what is there outlasts an interruption
    if not arguments.only and arguments.device is None:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
