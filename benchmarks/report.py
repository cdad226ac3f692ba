"""The table and the picture of the benchmark."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["draw", "write"]

TITLES = {
    "nothing": "All events available, nothing attached",
    "accumulation": "Accumulation over 4",
    "clipping": "Clipping by norm, a schedule per step, a history of its rates",
    "logging": "TensorBoard every 10 iterations and a progress bar, over the plain bare loop",
    "everything": "Everything attached",
    "handlers running": "Handlers that run at every iteration, over the same trainer without them",
    "handlers sleeping": "Handlers whose filter says no, over the same trainer without them",
    "game": "A Wasserstein GAN, per discriminator step; the generator has its turn after each, or after every fifth",
    "large": "A model that takes over 2 ms a step",
    "large, everything": "The same with everything attached",
    "gpu, tiny": "A tiny model on a GPU",
    "gpu, tiny, fused": "A tiny model on a GPU, the optimizer fused",
    "gpu, tiny, logged": "A tiny model on a GPU, logged",
    "gpu, wide": "A wide model on a GPU",
    "gpu, wide, fused": "A wide model on a GPU, the optimizer fused",
    "gpu, wide, logged": "A wide model on a GPU, logged",
    "gpu, images": "Convolutions on a GPU",
}
BUDGETS = {"nothing": "10 µs", "accumulation": "10 µs", "logging": "30 µs", "game": "15 µs", "large": "1.01 times"}
"""What camshaft may cost."""
PACKAGES = (
    "torch", "pytorch-ignite", "lightning", "accelerate", "poutyne", "torchtnt", "skorch", "keras", "fastai", "mosaicml",
    "tensorboard", "tqdm",
)  # fmt: skip


def write(results: list[Any], skipped: Mapping[str, str], folder: Path, clock: str) -> None:
    """Writes ``overhead.md`` and ``overhead.json``, or ``gpu.md`` and ``gpu.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version()} | {name: version for name in PACKAGES if (version := version_of(name))}
    content = {
        "clock": clock,
        "unit": "us per iteration",
        "versions": versions,
        "results": [asdict(result) for result in results],
        "skipped": dict(skipped),
    }
    name = "gpu" if clock == "device" else "overhead"
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n".join(lines(results, skipped, versions, clock)) + "\n")


def version_of(package: str) -> str | None:
    """The version of a package; ``None`` where it isn't installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lines(results: list[Any], skipped: Mapping[str, str], versions: Mapping[str, str], clock: str) -> list[str]:
    """The page, line by line."""
    times = {"cpu": "processor time of the process, one thread, on a CPU", "wall": "time on the wall, one thread, on a CPU"}
    time = times.get(clock, "time on the wall until the GPU is done")
    command = "python benchmarks/overhead.py --device cuda" if clock == "device" else "make bench"
    page = [
        "# What a loop costs beside its step",
        "",
        f"Microseconds per iteration beside the loop named first: the median of the paired differences over the rounds, and "
        f"its quartiles; {time}. Written by `{command}`.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    for scenario, title in TITLES.items():
        rows = [result for result in results if result.scenario == scenario]
        if not rows:
            continue
        budget = f" (budget: {BUDGETS[scenario]})" if scenario in BUDGETS else ""
        page += ["", f"## {title}{budget}", ""]
        page += [
            "| beside | its own | contestant | median | quartiles | ratio | final weights |",
            "|---|---|---|---|---|---|---|",
        ]
        in_order = rows if scenario.startswith("handlers") else sorted(rows, key=lambda r: r.median)
        page += [row_of(result) for result in in_order]
        if scenario.startswith("handlers"):
            page += ["", *per_handler(rows)]
    if skipped:
        page += ["", "Left out: " + "; ".join(f"{name} ({why})" for name, why in skipped.items()) + "."]
    return page


def row_of(r: Any) -> str:
    """One result as a row of the table."""
    quartiles = f"{r.low:.1f} to {r.high:.1f}"
    return f"| {r.baseline} | {r.per_iteration:.0f} | {r.name} | {r.median:.1f} | {quartiles} | {r.ratio:.3f} | {r.weights} |"


def per_handler(rows: list[Any]) -> list[str]:
    """The cost of one handler, from the run with the most of them."""
    most: dict[str, Any] = {}
    for row in rows:  # in order of their number
        most[row.baseline] = row
    count = {name: int(row.name.split(", ")[1].split()[0]) for name, row in most.items()}
    return [f"{name}: {row.median / count[name]:.2f} µs each (of {count[name]})." for name, row in most.items()]


def draw(results: list[Any], path: Path) -> None:
    """Bars of what each contestant costs, with nothing attached and with curves and a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, scenario in zip(figure.subplots(1, 2), ("nothing", "logging"), strict=True):
        rows = sorted((r for r in results if r.scenario == scenario), key=lambda r: -r.median)
        names = [r.name.removesuffix(", TensorBoard + bar") for r in rows]
        colours = ["#c8102e" if name == "camshaft" else "#9aa5b1" for name in names]
        spans = [[max(r.median - r.low, 0) for r in rows], [max(r.high - r.median, 0) for r in rows]]
        bars = axes.barh(names, [max(r.median, 0.1) for r in rows], color=colours, xerr=spans, error_kw={"elinewidth": 1})
        axes.bar_label(bars, [f" {r.median:.0f}" for r in rows], padding=4)
        axes.set(xscale="log", xlabel="µs per iteration over the bare loop (quartiles)")
        axes.set_xlim(1, 4 * max([r.median for r in rows], default=10.0))
        axes.set_title({"nothing": "nothing attached", "logging": "TensorBoard every 10, progress bar"}[scenario])
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
