"""Checkpoints that rotate, can't be lost, and resume exactly."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError, remove_temporary_files
from camshaft.checkpoints.index import Entry, Index, best_first, retained
from camshaft.checkpoints.names import file_name
from camshaft.checkpoints.sharded_load import load_manifest, load_shards
from camshaft.checkpoints.sharded_save import save_shards
from camshaft.checkpoints.writer import CheckpointWriter
from camshaft.distributed.collectives import broadcast_object, is_main_process, world_size
from camshaft.events import Events, Priority, split
from camshaft.handler import Handler, Listener, on
from camshaft.metrics import MetricWatch, as_number, check_mode

__all__ = ["CheckpointRotation"]

logger = logging.getLogger("camshaft")


class CheckpointRotation(Handler):
    """Writes checkpoints, keeps the last and the best, and resumes from them.

    A request inside a window waits for its end and comes after every other handler of that moment. The end of a run,
    ``terminate()`` included, saves once more where anything is new; an exception writes nothing. A checkpoint holds all that
    a run is: see "Checkpoints and resume" in the guide.

    Args:
        dirname: the folder; it is made if it does not exist.
        keep_last: how many of the newest are kept.
        keep_best: how many of the best are kept besides, by ``metric``.
        metric: the name of the score in ``state.metrics``.
        mode: ``"max"`` where more is better, ``"min"`` where less is.
        every: the event, or events, that ask for a checkpoint.
        every_minutes: asks for one whenever so many minutes have gone since the last, too.
        background: has a thread write while training continues; the tensors are copied first, one save is under way at most, and
            the last is waited for at the end of the run.
        sharded: every process writes its own part into a folder ``step-00000123`` (``torch.distributed.checkpoint``): for
            FSDP2 and for large states. It loads on another number of processes too.

    Of several processes the first writes, all take part, and each resumes from its own random state and place in the data.

    Raises:
        ValueError: if a value isn't allowed; in the run if the metric never appears.
        OSError: at ``attach`` if the folder can't be written.

    Example:
        >>> import tempfile, torch
        >>> from camshaft import create_trainer
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
        >>> checkpoints = CheckpointRotation(tempfile.mkdtemp()).attach(trainer)
        >>> _ = trainer.run([(torch.zeros(2, 8), torch.zeros(2, 1))] * 2)
        >>> checkpoints.last.name
        'step-00000002.pt'
    """

    def __init__(
        self,
        dirname: str | os.PathLike[str],
        keep_last: int = 3,
        keep_best: int = 0,
        metric: str | None = None,
        mode: str = "max",
        every: Any = Events.EPOCH_COMPLETED,
        every_minutes: float | None = None,
        *,
        background: bool = False,
        sharded: bool = False,
    ) -> None:
        if background and sharded:
            raise ValueError("background and sharded exclude each other: the processes write their parts together, in front")
        check_mode(mode, metric)
        for name, value, least in (("keep_last", keep_last, 1), ("keep_best", keep_best, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if keep_best and metric is None:
            raise ValueError("keep_best needs metric, the name of the score in state.metrics, such as 'val/accuracy'")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"every_minutes must be a positive number, got {every_minutes!r}")
        self.folder = Path(dirname)
        self.keep_last, self.keep_best, self.mode = keep_last, keep_best, mode
        self.every, self.every_minutes = split(every), every_minutes
        self.watch = None if metric is None else MetricWatch(metric, "CheckpointRotation")
        self.background, self.sharded = background, sharded
        self._writer: CheckpointWriter | None = None
        self._requested = False
        self._score: tuple[int, float] | None = None
        self._last_saved_score: tuple[int, float | None] = -1, None
        self._saved_at: tuple[int, bool] | None = None
        self._saved_when = time.monotonic()

    @property
    def writer(self) -> CheckpointWriter:
        """What writes into the folder."""
        if self._writer is None:
            self._writer = CheckpointWriter(Index(self.folder), self._retained, self.background)
        return self._writer

    @property
    def index(self) -> Index:
        """What the folder holds; a save in the background is waited for."""
        if not is_main_process():
            return Index(self.folder)  # as the first process has left it
        self.writer.wait()
        return self.writer.index

    def _retained(self, entries: list[Entry]) -> list[Entry]:
        return retained(entries, self.keep_last, self.keep_best, self.mode)

    @property
    def longest_save(self) -> float:
        """How many seconds the longest save so far has taken."""
        return self.writer.longest

    @property
    def last(self) -> Path | None:
        """The newest checkpoint."""
        return self.folder / self.index.entries[-1].file if self.index.entries else None

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best score."""
        ranked = best_first(self.index.entries, self.mode)
        return self.folder / ranked[0].file if ranked else None

    # -- when to save -------------------------------------------------------------------------------------------------

    def on_attach(self, engine: Any) -> None:
        """Makes the folder, sees that it can be written, and clears what a killed save has left there."""
        if not hasattr(engine, "checkpoint"):
            raise TypeError(f"CheckpointRotation needs a trainer from create_trainer(), got {type(engine).__name__}")
        if not is_main_process():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".camshaft-{os.getpid()}.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            file = next((place for place in (self.folder, *self.folder.parents) if place.is_file()), None)
            reason = error.strerror if file is None else f"{file} is a file, not a folder"
            raise type(error)(
                error.errno, f"dirname: checkpoints can't be written there ({reason})", str(self.folder)
            ) from error
        remove_temporary_files(self.folder)

    def listeners(self) -> Iterator[Listener]:
        """The events that ask, and the moments at which saving comes last of all."""
        yield from super().listeners()
        for event in self.every:
            yield Listener(event, self.request, Priority.SYNC - 1)
        yield Listener(Events.ITERATION_COMPLETED(self._when_due), self.save_if_requested, Priority.SAVE)
        yield Listener(Events.EPOCH_COMPLETED, self.save_if_requested_after_epoch, Priority.SAVE)
        if self.watch is not None:
            yield Listener(Events.COMPLETED, self.check_at_end, Priority.SAVE + 2)

    @on(Events.STARTED)
    def start(self, engine: Any) -> None:
        """A new run has saved nothing yet, a resumed one has nothing new."""
        resumed = engine.state.iteration > 0
        self._requested, self._score, self._saved_at = False, None, self._now(engine) if resumed else None
        self._saved_when, self._last_saved_score = time.monotonic(), (-1, None)
        if self.watch is not None:
            self.watch.start(engine)

    def request(self) -> None:
        """Asks for a checkpoint at the end of the open window."""
        self._requested = True

    def requests_checkpoint(self, engine: Any) -> bool:
        """Whether this process wants a checkpoint; of several, all take part if one does."""
        self._look_at_score(engine)
        return self._requested or self._interval_elapsed()

    def _interval_elapsed(self) -> bool:
        return self.every_minutes is not None and time.monotonic() - self._saved_when >= self.every_minutes * 60

    def _when_due(self, engine: Any, _: int) -> bool:
        if engine.coordinator.is_distributed:
            return self.agreed
        if self._requested or (self.watch is not None and self.watch.is_new(engine)):
            return True
        return self._interval_elapsed()

    def save_if_requested(self, engine: Any) -> None:
        """Saves what has been asked for, unless a window is open."""
        self.writer.report_if_done()
        due = engine.coordinator.checkpoint_is_requested(engine, self)
        self._requested = self._requested or due  # a request made since is agreed on after the next iteration
        if due and not engine.window_is_open:
            self._save()

    def save_if_requested_after_epoch(self, engine: Any) -> None:
        """The same after an epoch, when the metric must have appeared."""
        if self.watch is not None:
            self.watch.check_exists(engine)
        self.save_if_requested(engine)

    @on(Events.COMPLETED, priority=Priority.SAVE)
    def finish(self, engine: Any) -> None:
        """Saves the end of a run where anything is new, the gradients of an open window included."""
        if engine.coordinator.any_rank(self.requests_checkpoint(engine) or self._saved_at != self._now(engine)):
            self._save()
        self.writer.wait()
        engine.coordinator.barrier()  # no rank exits before the file is complete

    def check_at_end(self, engine: Any) -> None:
        """A metric that a run has ended without is a mistake."""
        assert self.watch is not None
        self.watch.check_at_end(engine)

    def _look_at_score(self, engine: Any) -> None:
        """Notes a new score, and asks for a checkpoint if it is among the best."""
        if self.watch is None or not self.watch.is_new(engine):
            return
        score = self.watch.take(engine)
        if not math.isfinite(score):
            return
        step = next(iter(engine.phases.values())).optimizer_step
        self._score = step + engine.window_is_open, score  # inside a window it goes to the checkpoint at the window's end
        if not is_main_process():  # the first process knows what the folder holds
            return
        ranked = best_first(self.index.entries, self.mode)[: self.keep_best]
        is_top_k = len(ranked) < self.keep_best or any(
            (score > entry.score) if self.mode == "max" else (score < entry.score)
            for entry in ranked
            if entry.score is not None
        )
        self._requested = self._requested or is_top_k

    @staticmethod
    def _now(engine: Any) -> tuple[int, bool]:
        return engine.state.iteration, engine.state.epoch_is_open

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Writes a checkpoint now, or inside a run at the end of the open window, after every other handler.

        In a handler of ``EXCEPTION_RAISED`` it is written now, for no window's end is to come; of several processes, others may
        never come to it, so that this is an error there.

        Returns:
            The file; ``None`` if it is still to come.

        Raises:
            RuntimeError: if the handler isn't attached, or several processes would wait for each other after an exception.
        """
        if self.engine is None:
            raise RuntimeError("CheckpointRotation isn't attached to a trainer; call attach(trainer) first")
        if self.engine.is_running and self.engine.last_event_name != Events.EXCEPTION_RAISED:
            self.request()
            return None
        if self.engine.is_running and self.engine.coordinator.is_distributed:
            raise RuntimeError(
                "save() in EXCEPTION_RAISED would wait for the other processes, which may never come to it; resume from the "
                "last checkpoint, and save more often (every=, every_minutes=)"
            )
        return self._save()

    def _save(self) -> Path | None:
        engine, state = self.engine, self.engine.state
        self._requested = False
        step = next(iter(engine.phases.values())).optimizer_step
        score = (
            self._last_saved_score[1] if self._last_saved_score[0] == step else None
        )  # saved again, it is the same weights' score
        if self._score is not None and self._score[0] == step + engine.window_is_open:
            score, self._score = self._score[1], None
        self._last_saved_score = step, score
        metrics = {name: _finite(value) for name, value in state.metrics.items()}
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = Entry(file_name(step, self.sharded), step, state.iteration, state.epoch, score, metrics, when)
        content = engine.checkpoint(self.sharded)
        path = self._write(content, entry)
        if path is not None:
            self._saved_at, self._saved_when = self._now(engine), time.monotonic()
        return path

    def _write(self, content: dict[str, Any], entry: Entry) -> Path | None:
        """Writes, by the first process alone or by each its part, and all hear what has come of it."""
        if is_main_process():
            content["rotation"] = {"identity": self.writer.index.identity, "entry": vars(entry)}
        if self.sharded:
            self.writer.save = self._sharded_before(content, entry)
        path: Path | None = None
        error: Exception | None = None
        if is_main_process():
            try:
                path = self.writer.write(content, entry)
            except OSError as failure:
                error = failure
        text = None if error is None else str(error)
        if world_size() > 1:
            path, text = broadcast_object((path, text))
        if error is not None:
            raise error
        if text is not None:
            raise OSError(f"rank 0 could not write a checkpoint: {text}")
        return path

    def _sharded_before(self, content: dict[str, Any], entry: Entry) -> Any:
        """Has every process write its part, and gives what tells the first one's writer how that went."""
        trouble: OSError | None = None
        try:
            save_shards(content, self.folder / entry.file)
        except OSError as failure:
            trouble = failure

        def tell(*_: Any) -> None:
            if trouble is not None:
                raise trouble

        return tell

    @on(Events.EXCEPTION_RAISED)
    def on_exception(self, engine: Any, error: BaseException) -> None:
        """An exception writes nothing, but lets a save in the background end."""
        self.writer.wait()

    # -- resuming -----------------------------------------------------------------------------------------------------

    def resume(self, which: str | os.PathLike[str] = "auto") -> Path | None:
        """Sets the trainer back to a checkpoint; the next ``run()`` resumes from there.

        Args:
            which: ``"auto"`` for the newest good file (a warning names the bad ones passed over), ``"best"``, or a path.

        Returns:
            The file that was loaded; ``None`` for ``"auto"`` in a folder without any checkpoint.

        Raises:
            RuntimeError: if the handler isn't attached, the file asked for can't be used, or none of the folder can.
            ValueError: if the checkpoint is of another model, optimizer or scheme.
        """
        if self.engine is None:
            raise RuntimeError("CheckpointRotation isn't attached to a trainer; call attach(trainer) first")
        if self.engine.is_running:
            raise RuntimeError("resume() can't be called inside a run; call it before run()")
        path, content = self._chosen(which) if world_size() == 1 else self._chosen_together(which)
        if path is None:
            return None
        if path.is_dir():
            content = load_shards(path, content, self.engine.sharding_reference)
        try:
            self.engine.restore(content)
        except ValueError as error:
            raise ValueError(f"{path} can't be resumed here: {error}") from error
        logger.info("resumed from %s: epoch %d, step %d", path, self.engine.state.epoch, self.engine.state.optimizer_step)
        return path

    def _chosen_together(self, which: str | os.PathLike[str]) -> tuple[Path | None, Any]:
        """The first process chooses, and the others read the same."""
        path: Path | None = None
        content: Any = None
        error: Exception | None = None
        if is_main_process():
            try:
                path, content = self._chosen(which)
            except (CheckpointError, OSError) as failure:
                error = failure
        path, text = broadcast_object((path, None if error is None else str(error)))
        if error is not None:
            raise error
        if text is not None:
            raise CheckpointError(f"rank 0 can't resume: {text}")
        return path, content if is_main_process() or path is None else read(path)

    def _chosen(self, which: str | os.PathLike[str]) -> tuple[Path | None, Any]:
        """The checkpoint that is asked for, and what it holds."""
        if which == "best":
            if self.best is None:
                raise CheckpointError(f"there is no best checkpoint in {self.folder}: none was saved with a finite score")
            return self.best, read(self.best)
        if which != "auto":
            if not Path(which).exists():
                raise CheckpointError(f"{which} does not exist; which must be 'auto', 'best' or the path of a checkpoint")
            return Path(which), read(Path(which))
        passed_over: list[str] = []
        for path in self.index.newest_first():
            try:
                content = read(path)
            except CheckpointError as error:
                passed_over.append(str(error))
                continue
            if passed_over:
                warnings.warn(f"resumed from {path}; passed over: {'; '.join(passed_over)}", RuntimeWarning, stacklevel=3)
            return path, content
        if passed_over:
            raise CheckpointError(f"no checkpoint in {self.folder} can be used: {'; '.join(passed_over)}")
        return None, None


def read(path: Path) -> Any:
    """What a checkpoint holds; of a folder, what it holds beside its tensors.

    Raises:
        CheckpointError: says what is wrong with it.
    """
    content = load_manifest(path) if path.is_dir() else load_checked(path)
    if not isinstance(content, dict) or "phases" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of a trainer")
    return content


def _finite(value: Any) -> float | None:
    try:
        number = as_number(value, "metric")
    except TypeError:
        return None
    return number if math.isfinite(number) else None
