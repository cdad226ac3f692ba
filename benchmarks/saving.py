"""How long training stands still for a checkpoint, in front of it and behind it.

usage: python benchmarks/saving.py [--quick]

A model whose parameters are 64 MB, then 512 MB, is saved between steps; what is measured is the time from the request to the
moment when the next step could begin. Foreground and background take turns in one process; medians and quartiles are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from camshaft import CheckpointRotation, create_trainer

RESULTS = Path(__file__).parent / "results"


def stands_still(megabytes: int, background: bool, folder: str) -> tuple[float, float]:
    """Seconds for which training stands still, and until the file is durable."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(1 << 18)) for _ in range(megabytes)])  # 1 MB each
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_trainer(model, optimizer, None, compute_loss=lambda model, batch: model[0].sum())
    rotation = CheckpointRotation(folder, keep_last=1, background=background).attach(trainer)
    started = time.perf_counter()
    rotation.save()
    still = time.perf_counter() - started
    rotation.writer.wait()
    return still, time.perf_counter() - started


def main() -> None:
    """Measures, prints and writes ``results/saving.md`` and ``.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round with 8 MB, and no files")
    quick = parser.parse_args().quick
    rows = []
    for megabytes in (8,) if quick else (64, 512):
        taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(1 if quick else 9):
            for background in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    taken[background].append(stands_still(megabytes, background, folder))
        for background, times in taken.items():
            still, durable = zip(*times, strict=True)
            quartiles = statistics.quantiles(still, n=4) if len(still) > 1 else [still[0]] * 3
            rows.append(
                {
                    "megabytes": megabytes,
                    "where": "background" if background else "foreground",
                    "stands_still_ms": [round(1e3 * value, 1) for value in quartiles],
                    "durable_ms": round(1e3 * statistics.median(durable), 1),
                }
            )
    lines = ["| state | written | training stands still, ms: median (quartiles) | durable after, ms |", "|---|---|---|---|"]
    for row in rows:
        low, middle, high = row["stands_still_ms"]
        lines.append(f"| {row['megabytes']} MB | {row['where']} | {middle} ({low} to {high}) | {row['durable_ms']} |")
    print("\n".join(lines))
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "saving.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "saving.md").write_text("# How long training stands still for a checkpoint\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
