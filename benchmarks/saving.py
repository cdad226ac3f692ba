"""How long training stands still for a checkpoint, in front of it and behind it.

usage: python benchmarks/saving.py [--quick]
       python benchmarks/saving.py --device cuda [--layers 8]

A model whose parameters are 64 MB, then 512 MB, is saved between steps; what is measured is the time from the request to the
moment when the next step could begin. Foreground and background take turns in one process; medians and quartiles are shown.

With ``--device`` a transformer is trained with AdamW, and saved between steps as a run does it. What is measured is how long
a request holds the loop up, without waiting for the device, and how long a step takes while the file is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from camshaft import CheckpointRotation, Events, create_trainer

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


class Training:
    """A transformer, by default with a state of about 383 MB including the moments of AdamW, and its steps."""

    def __init__(self, device: str, layers: int, folder: str, background: bool) -> None:
        torch.manual_seed(0)
        width = 576
        layer = torch.nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device)
        optimizer = torch.optim.AdamW(self.model.parameters(), fused=device == "cuda")
        self.batch = torch.randn(8 if device == "cuda" else 1, 256 if device == "cuda" else 32, width, device=device)
        self.trainer = create_trainer(
            self.model, optimizer, None, compute_loss=lambda model, batch: model(batch).square().mean()
        )
        self.rotation = CheckpointRotation(folder, keep_last=1, every=Events.COMPLETED, background=background)
        self.rotation.attach(self.trainer)
        self.device = torch.device(device)

    def wait(self) -> None:
        """Waits for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def measure(self, saves: int, steps: int = 10) -> dict[str, float]:
        """Medians in ms: the time in which a save holds the loop up, and that of a step with and without a save behind it."""
        taken: dict[str, list[float]] = {"still": [], "alone": [], "beside": []}
        started, save = 0.0, self.rotation._save

        def timed_save() -> Path | None:
            begun = time.perf_counter()
            path = save()
            taken["still"].append(time.perf_counter() - begun)
            return path

        self.rotation._save = timed_save  # type: ignore[method-assign]

        def step(trainer: Any) -> None:
            nonlocal started
            self.wait()
            now, place = time.perf_counter(), trainer.state.iteration % (2 * steps)
            writing = self.rotation.writer._thread is not None and self.rotation.writer._thread.is_alive()
            if place > steps and writing:
                taken["beside"].append(now - started)
            elif 1 < place <= steps and not writing:
                taken["alone"].append(now - started)
            if place == steps:
                self.rotation.writer.wait()
                self.rotation.request()
            started = time.perf_counter()

        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
        self.trainer.run([self.batch] * (2 * steps * (saves + 1)), max_epochs=1)
        taken["still"] = taken["still"][1:-1]  # the first makes the memory of the copy; the last is that of the end
        return {name: round(1e3 * statistics.median(times), 2) if times else float("nan") for name, times in taken.items()}


def training(device: str, layers: int, saves: int) -> None:
    """Prints how saves hold up a transformer's training."""
    print(
        "| written | the loop stands still, ms | a step alone, ms | a step beside the write, ms |",
        "|---|---|---|---|",
        sep="\n",
    )
    for background in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            found = Training(device, layers, folder, background).measure(saves)
        print(f"| {'background' if background else 'foreground'} | {found['still']} | {found['alone']} | {found['beside']} |")


def main() -> None:
    """Measures, prints and writes ``results/saving.md`` and ``.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round with 8 MB, and no files")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="trains a transformer on it instead, and writes no files")
    parser.add_argument("--layers", type=int, default=8, help="of the transformer")
    parser.add_argument("--saves", type=int, default=9, help="of the transformer")
    arguments = parser.parse_args()
    if arguments.device is not None:
        training(arguments.device, arguments.layers, arguments.saves)
        return
    quick = arguments.quick
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
