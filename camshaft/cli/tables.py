"""A run, and the results of checking its files, as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from camshaft.checkpoints.index import INDEX
from camshaft.checkpoints.text import printable
from camshaft.cli.curves import Curve, Curves
from camshaft.cli.integrity import Integrity
from camshaft.cli.run import Checkpoint, Run

__all__ = ["bytes_as_text", "print_integrity", "print_run", "sparkline"]

BARS = "▁▂▃▄▅▆▇█"
WIDE = 110
"""The number of columns that the curves need."""

MOST_ROWS = 1000
MOST_WARNINGS = 20
LONGEST_NAME = 200
"""What is printed at most, however much a file holds."""


def print_run(run: Run, console: Console) -> None:
    """Prints what a run has written: checkpoints, metrics, learning rates, and why it stopped."""
    drawn = console.encoding.startswith("utf") and console.width >= WIDE
    console.print(Text(printable(str(run.path)), style="bold"), soft_wrap=True)
    console.print(checkpoint_table(run.checkpoints) if run.checkpoints else Text("no checkpoints"), "")
    for title, curves in (("metrics", run.metrics), ("learning rates", run.learning_rates)):
        console.print(curve_table(title, curves, drawn=drawn) if curves else Text(f"no {title}"), "")
    for warning in shown_of(run.warnings, console):
        console.print(Text.assemble(("bad: ", "bold red"), printable(warning)), soft_wrap=True)
    console.print(Text.assemble(("why it stopped: ", "bold"), printable(run.ending.reason)), soft_wrap=True)


def checkpoint_table(checkpoints: Sequence[Checkpoint]) -> Table:
    """One row for each checkpoint, oldest first."""
    table = new_table("checkpoints", "file", "step", "epoch", "iteration", "score", "written", "size")
    if len(checkpoints) > MOST_ROWS:
        table.caption = Text(f"the newest {MOST_ROWS} of {len(checkpoints)} checkpoints")
    for one in checkpoints[-MOST_ROWS:]:
        table.add_row(
            name_of(one.file),
            *(Text(count_as_text(number)) for number in (one.optimizer_step, one.epoch, one.iteration)),
            "" if one.score is None else f"{one.score:.5g}",
            name_of(one.time.replace("T", " ").removesuffix("+00:00")),
            Text("does not exist", style="red") if one.size is None else bytes_as_text(one.size),
        )
    return table


def curve_table(title: str, curves: Curves, *, drawn: bool) -> Table:
    """One row for each curve: its last value and its extremes, each with its step."""
    table = new_table(
        title, "name", "points", "last", "step", "lowest", "step", "highest", "step", *(["curve"] if drawn else [])
    )
    if len(curves) > MOST_ROWS:
        table.caption = Text(f"{MOST_ROWS} of {len(curves)} curves")
    for name, curve in sorted(curves.items())[:MOST_ROWS]:
        finite = [point for point in curve if math.isfinite(point.value)]
        chosen = [curve[-1]]
        if finite:
            chosen += [min(finite, key=lambda point: point.value), max(finite, key=lambda point: point.value)]
        cells = [cell for point in chosen for cell in (f"{point.value:.5g}", str(point.step))]
        table.add_row(name_of(name), str(len(curve)), *cells, *[""] * (6 - len(cells)), *([sparkline(curve)] if drawn else []))
    return table


def print_integrity(integrity: Integrity, console: Console) -> None:
    """Prints the result for each file, and a line that sums them up."""
    table = new_table(printable(str(integrity.folder)), "file", "", "what")
    rows = sorted(integrity.files, key=lambda verdict: verdict.good) if len(integrity.files) > MOST_ROWS else integrity.files
    if len(rows) > MOST_ROWS:
        table.caption = Text(f"{MOST_ROWS} of {len(rows)} files, the bad ones first")
    for verdict in rows[:MOST_ROWS]:
        said = [verdict.reason] if verdict.reason else []
        if not verdict.listed and verdict.file != INDEX:
            said.append(f"not listed in {INDEX}")
        word = Text("good", style="green") if verdict.good else Text("bad", style="bold red")
        table.add_row(name_of(verdict.file), word, Text(printable("; ".join(said))))
    for name in integrity.leftovers[:MOST_ROWS]:
        table.add_row(name_of(name), Text("left", style="yellow"), Text("of a save that was killed; the next run deletes it"))
    console.print(table)
    bad = len(integrity.bad)
    console.print(Text(f"{bad} of {len(integrity.files)} files are bad" if bad else "every file is as it was written"))


def shown_of(warnings: Sequence[str], console: Console) -> Sequence[str]:
    """The first warnings; says how many there are if there are more."""
    if len(warnings) > MOST_WARNINGS:
        console.print(Text(f"{len(warnings)} problems, of which the first {MOST_WARNINGS} are shown"))
    return warnings[:MOST_WARNINGS]


def name_of(text: str) -> Text:
    """A name from a file as a cell."""
    return Text(printable(text, limit=LONGEST_NAME))


def count_as_text(number: int) -> str:
    """A count from a file, which could have thousands of digits."""
    return str(number) if number < 10**18 else "over 10^18"


def new_table(title: str, *columns: str) -> Table:
    """An empty table; words on the left, numbers on the right, and nothing is cut off."""
    words = {"file", "name", "", "what", "written", "curve"}
    table = Table(title=Text(title, style="bold"), title_justify="left", header_style="dim", show_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", overflow="fold", no_wrap=column == "file")
    return table


def sparkline(curve: Curve, width: int = 20) -> str:
    """A curve in one line of text, by the means of ``width`` equal parts.

    Example:
        >>> from camshaft.cli.curves import Point
        >>> sparkline([Point(step, step) for step in range(8)])
        '▁▂▃▄▅▆▇█'
    """
    if len(curve) < 2:
        return ""
    values = [point.value for point in curve if math.isfinite(point.value)]
    parts = min(width, len(values))
    bounds = [len(values) * part // parts for part in range(parts + 1)] if parts else []
    means = [sum(values[low:high]) / (high - low) for low, high in zip(bounds, bounds[1:], strict=False)]
    lowest, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(BARS[round((mean - lowest) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def bytes_as_text(size: int) -> str:
    """A size in readable units.

    Example:
        >>> bytes_as_text(999), bytes_as_text(64_200_000)
        ('999 B', '64.2 MB')
    """
    if size < 1000:
        return f"{size} B"
    power = min(int(math.log10(size)) // 3, 4)
    return f"{size / 1000**power:.1f} {'kMGT'[power - 1]}B"
