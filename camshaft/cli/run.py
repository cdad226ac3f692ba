"""What a run has written to the disk: plain data, read from its checkpoints and its event files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from camshaft.checkpoints.index import Entry, Index
from camshaft.cli.contents import newest_content, size_of
from camshaft.cli.curves import NO_EVENTS, Curves, Events, Point, is_learning_rate, read_events
from camshaft.cli.folders import find_folders
from camshaft.optimizers import group_rates
from camshaft.tensorboard_tags import finished

__all__ = ["Checkpoint", "Ending", "Run", "ending_from", "read_run"]


@dataclass(frozen=True)
class Checkpoint:
    """One line of the index, and its file."""

    file: str
    optimizer_step: int
    epoch: int
    iteration: int
    score: float | None
    metrics: Mapping[str, float | None]
    time: str
    size: int | None
    """In bytes; ``None`` if the file does not exist."""


@dataclass(frozen=True)
class Ending:
    """Why a run stopped."""

    reason: str
    ended: bool
    """Whether it is known to have ended: ``False`` if it was killed, or still continues."""


@dataclass(frozen=True)
class Run:
    """What a run has written."""

    path: Path
    checkpoints_folder: Path | None = None
    events_folder: Path | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    """Oldest first."""
    metrics: Curves = field(default_factory=dict)
    """Name -> (optimizer step, value): from the event files, and if there are none from the checkpoints."""
    learning_rates: Curves = field(default_factory=dict)
    """Name -> (optimizer step, rate): from ``LRHistory`` if a checkpoint has it, otherwise from the event files."""
    ending: Ending = Ending("not known", ended=False)
    warnings: tuple[str, ...] = ()
    """What could not be read, and why."""

    def as_json(self) -> dict[str, Any]:
        """The same as plain values for ``json.dumps``; a value that is not finite is ``None``, which JSON can express."""
        return {
            "run": str(self.path),
            "checkpoints_folder": None if self.checkpoints_folder is None else str(self.checkpoints_folder),
            "events_folder": None if self.events_folder is None else str(self.events_folder),
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
            "metrics": plain(self.metrics),
            "learning_rates": plain(self.learning_rates),
            "ending": asdict(self.ending),
            "warnings": list(self.warnings),
        }


def plain(curves: Curves) -> dict[str, list[list[float | None]]]:
    """Curves as lists of ``[step, value]``."""
    return {name: [[step, value if math.isfinite(value) else None] for step, value in curve] for name, curve in curves.items()}


def read_run(path: Path) -> Run:
    """Reads a run; nothing is written and no code of a file is run.

    Args:
        path: the run's folder, or its folder of checkpoints.

    Returns:
        The run.

    Raises:
        NoRun: if there is none.

    Example:
        >>> import tempfile
        >>> from camshaft import CheckpointRotation, create_trainer
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = CheckpointRotation(folder).attach(trainer)
        >>> _ = trainer.run([(torch.zeros(2, 8), torch.zeros(2, 1))] * 2)
        >>> run = read_run(folder)
        >>> run.checkpoints[-1].file, run.ending.reason
        ('step-00000002.pt', 'finished after 1 epoch')
    """
    folders = find_folders(path)
    index = None if folders.checkpoints is None else Index(folders.checkpoints)
    newest, content, warnings = (None, {}, []) if index is None else newest_content(index.newest_first())
    events, unreadable = (NO_EVENTS, []) if folders.events is None else read_events(folders.events)
    entries = [] if index is None else index.entries
    rates = {name: curve for name, curve in events.scalars.items() if is_learning_rate(name)}
    return Run(
        path=path,
        checkpoints_folder=folders.checkpoints,
        events_folder=folders.events,
        checkpoints=() if index is None else tuple(checkpoint_of(entry, index.folder) for entry in entries),
        metrics={name: curve for name, curve in events.scalars.items() if name not in rates} or metrics_from(entries),
        learning_rates=history_from(content) or rates or present_rates(content),
        ending=ending_from(content, events, saved_at(newest, content)),
        warnings=(*warnings, *unreadable),
    )


def checkpoint_of(entry: Entry, folder: Path) -> Checkpoint:
    """An entry of the index with the size of its file."""
    return Checkpoint(
        file=entry.file,
        optimizer_step=entry.optimizer_step,
        epoch=entry.epoch,
        iteration=entry.iteration,
        score=entry.score,
        metrics=entry.metrics,
        time=entry.time,
        size=size_of(folder / entry.file),
    )


def metrics_from(entries: Iterable[Entry]) -> dict[str, list[Point]]:
    """The metrics that the index holds for each checkpoint."""
    curves: dict[str, list[Point]] = {}
    for entry in entries:
        for name, value in entry.metrics.items():
            if value is not None:
                curves.setdefault(name, []).append(Point(entry.optimizer_step, value))
    return curves


def history_from(content: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The learning rates of the handler ``LRHistory``, whatever its name is."""
    for state in content.get("handlers", {}).values():
        if isinstance(state, Mapping) and state and all(is_noted(name, notes) for name, notes in state.items()):
            return {
                name: [Point(*point) for point in zip(steps.tolist(), rates.tolist(), strict=True)]
                for name, (steps, rates) in state.items()
            }
    return {}


def is_noted(name: Any, notes: Any) -> bool:
    """Whether an entry of a handler's state holds the steps and values of a learning rate."""
    if not isinstance(name, str) or not is_learning_rate(name) or not isinstance(notes, (list, tuple)) or len(notes) != 2:
        return False
    return all(isinstance(part, torch.Tensor) and part.dim() == 1 for part in notes) and len(notes[0]) == len(notes[1])


def present_rates(content: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The learning rates in the optimizers of a checkpoint, which the next step would use."""
    phases = content.get("phases", {})
    rates = {}
    for phase, state in phases.items():
        groups: Any = [SimpleNamespace(param_groups=optimizer["param_groups"]) for optimizer in state["optimizers"]]
        for name, rate in group_rates(groups):
            rates[f"{phase}/{name}" if len(phases) > 1 else name] = [Point(state["optimizer_step"] + 1, rate)]
    return rates


def ending_from(content: Mapping[str, Any], events: Events, saved: float) -> Ending:
    """Why a run stopped: from its event files, or else from its newest good checkpoint."""
    if events.ending is not None:
        return Ending(events.ending, ended=True)
    if not content:
        return unknown("there is no good checkpoint")
    if saved < events.began:
        return unknown("the newest good checkpoint was written before the latest run began")
    clocks = content["clocks"]
    epoch, iteration, max_epochs, max_iters = (clocks[name] for name in ("epoch", "iteration", "max_epochs", "max_iters"))
    last_epoch_is_over = max_epochs is not None and epoch >= max_epochs and not clocks["epoch_is_open"]
    if clocks.get("stop_reason") is not None:
        return Ending(clocks["stop_reason"], ended=True)
    if last_epoch_is_over or (max_iters is not None and iteration >= max_iters):
        return Ending(finished(epoch, iteration, max_iters), ended=True)
    where = f"epoch {epoch} of {max_epochs}" if max_iters is None else f"iteration {iteration} of {max_iters}"
    return unknown(f"the newest good checkpoint is of {where}")


def saved_at(path: Path | None, content: Mapping[str, Any]) -> float:
    """When a checkpoint was saved, in seconds since 1970; 0 if that is not known.

    The time in a checkpoint has full seconds. That of the file is more precise, but may be the time when it was copied.
    """
    entry = content.get("rotation", {}).get("entry", {})
    if path is None:
        return 0.0
    try:
        return min(datetime.fromisoformat(entry["time"]).timestamp() + 1, path.stat().st_mtime)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return 0.0


def unknown(why: str) -> Ending:
    """The ending of a run of which no file says why it stopped."""
    return Ending(f"not known: {why}; it still continues, was killed, or has failed", ended=False)
