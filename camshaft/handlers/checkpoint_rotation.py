"""Checkpoints that rotate, are never lost, and resume exactly."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from camshaft.checkpoints.folder import rank_zero_first, take_folder
from camshaft.checkpoints.index import Entry, Index
from camshaft.checkpoints.lock import FolderLock
from camshaft.checkpoints.optimizer_checks import check_optimizers
from camshaft.checkpoints.progress import entry_of, moment_of, step_of
from camshaft.checkpoints.retention import is_among_best, mode_of, retained
from camshaft.checkpoints.save_policy import SavePolicy
from camshaft.checkpoints.selection import best_of, last_of, load_chosen
from camshaft.checkpoints.sharded_save import save_shards
from camshaft.checkpoints.writer import CheckpointWriter, error_of, raise_if, size_of
from camshaft.distributed.collectives import is_main_process, on_rank_zero
from camshaft.events import Events, Priority, split
from camshaft.handler import Handler, Listener, on
from camshaft.metrics import MetricWatch, check_mode
from camshaft.validation import check_count, check_positive

__all__ = ["CheckpointRotation"]

logger = logging.getLogger("camshaft")

NOT_ATTACHED = "CheckpointRotation isn't attached to a trainer; call attach(trainer) first"
NO_TRAINER = f"{NOT_ATTACHED}, or resume(which, trainer) to only read the folder"


class CheckpointRotation(Handler):
    """Writes checkpoints, keeps the last and the best, and resumes from them.

    A request inside a window waits for the end of the window, and is carried out after every other handler of that moment. The
    end of a run, ``terminate()`` included, saves once more if anything is new; an exception saves nothing. A checkpoint holds
    everything that belongs to a run: see "Checkpoints and resume" in the guide.

    A folder belongs to one run at a time: from ``attach`` to ``detach``, or to the end of the process, a lock keeps others out.
    To only read, don't attach: ``CheckpointRotation(dirname).last``, ``.best`` and ``.resume(which, trainer)`` need no lock,
    never change the folder, and work while another process trains there. On a file system without locks ``attach`` warns.

    Args:
        dirname: the folder; it is created if it does not exist.
        keep_last: how many of the newest checkpoints are kept.
        keep_best: how many of the best are kept in addition, by ``metric``.
        metric: the name of the score in ``state.metrics``.
        mode: ``"max"`` if more is better, ``"min"`` if less is. Without ``metric`` a reader uses the mode of the run.
        every: the event, or events, at which a checkpoint is requested.
        every_minutes: requests one whenever this many minutes have passed since the last one, too.
        background: a thread writes while training continues. The tensors are copied first: those on an accelerator without
            waiting for it. The memory of that copy, on the host and on an accelerator that has room, is kept until the run
            ends or a save fails. One save runs at a time, and the end of the run waits for the last one.
        sharded: every rank writes its own part into a folder ``step-00000123`` (``torch.distributed.checkpoint``): for FSDP2
            and for large states. It can be loaded with another number of processes.

    With several processes rank 0 writes, all ranks take part, and each resumes from its own random state and data position.

    Raises:
        ValueError: if a value is not allowed; in the run, if the metric never appears.
        OSError: at ``attach``, if the folder cannot be written.
        RuntimeError: at ``attach``, if another run writes into the folder.

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
            raise ValueError("background and sharded exclude each other: the ranks write their parts at the same time")
        check_mode(mode, metric)
        self.keep_last, self.keep_best = check_count(keep_last, "keep_last"), check_count(keep_best, "keep_best", minimum=0)
        if keep_best and metric is None:
            raise ValueError("keep_best needs metric, the name of the score in state.metrics, such as 'val/accuracy'")
        if every_minutes is not None:
            check_positive(every_minutes, "every_minutes")
        self.folder = Path(dirname).absolute()  # so that a later chdir() changes nothing
        self.mode, self.every, self.policy = mode, split(every), SavePolicy(every_minutes)
        self.watch = None if metric is None else MetricWatch(metric, "CheckpointRotation")
        self.background, self.sharded = background, sharded
        self._lock = FolderLock(self.folder)
        self._writer: CheckpointWriter | None = None

    # -- the folder ---------------------------------------------------------------------------------------------------

    def on_attach(self, engine: Any) -> None:
        """Takes the folder for this trainer: makes it, locks it, and clears what a killed run has left there."""
        if not hasattr(engine, "checkpoint"):
            raise TypeError(f"CheckpointRotation needs a trainer from create_trainer(), got {type(engine).__name__}")
        self._writer = None
        rank_zero_first(lambda: take_folder(self._lock, engine))

    def detach(self) -> None:
        """Removes every method from the engine, waits for a save in the background, and gives the folder back."""
        super().detach()
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        finally:
            self._lock.release()

    @property
    def writer(self) -> CheckpointWriter:
        """The writer of the folder. Only rank 0 of an attached rotation has one."""
        if self._writer is None:
            self._writer = CheckpointWriter(Index(self.folder), self._retained, self.background, self._lock.check)
        return self._writer

    @property
    def index(self) -> Index:
        """What the folder holds; waits for a save in the background."""
        if self.engine is None or not is_main_process() or self._lock.was_taken_over:
            return Index(self.folder)  # as the owner has left it
        self.writer.wait()
        return self.writer.index

    def _retained(self, entries: list[Entry]) -> list[Entry]:
        return retained(entries, self.keep_last, self.keep_best, self.mode)

    @property
    def longest_save(self) -> float:
        """The duration of the longest save so far, in seconds."""
        return 0.0 if self._writer is None else self._writer.longest

    @property
    def last(self) -> Path | None:
        """The newest checkpoint."""
        return last_of(self.index)

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best score; without ``metric``, by the mode of the run that saved it."""
        index = self.index
        return best_of(index, self._mode_for(index))

    def _mode_for(self, index: Index) -> str:
        return self.mode if self.watch is not None else mode_of(index.entries, self.mode)

    # -- when to save -------------------------------------------------------------------------------------------------

    def listeners(self) -> Iterator[Listener]:
        """The events that request a checkpoint, and the moments at which it is saved, after every other handler."""
        yield from super().listeners()
        for event in self.every:
            yield Listener(event, self.request, Priority.SYNC - 1)
        yield Listener(Events.ITERATION_COMPLETED(self._when_due), self.save_if_requested, Priority.SAVE)
        yield Listener(Events.EPOCH_COMPLETED, self.save_if_requested_after_epoch, Priority.SAVE)
        if self.watch is not None:
            yield Listener(Events.COMPLETED, self.check_at_end, Priority.SAVE + 2)

    @on(Events.STARTED)
    def start(self, engine: Any) -> None:
        """A new run has saved nothing yet; a resumed one has nothing new."""
        if is_main_process() and self._lock.was_taken_over:  # by a trainer that is not running, or take_folder raises
            take_folder(self._lock, engine)
            self._writer = None  # the other may have written
        self.policy.start(moment_of(engine) if engine.state.iteration > 0 else None)
        if self.watch is not None:
            self.watch.start(engine)

    def request(self) -> None:
        """Requests a checkpoint at the end of the open window."""
        self.policy.requested = True

    def requests_checkpoint(self, engine: Any) -> bool:
        """Whether this rank wants a checkpoint; all ranks save if one does."""
        self._look_at_score(engine)
        return self.policy.is_due

    def _when_due(self, engine: Any, _: int) -> bool:
        if engine.coordinator.is_distributed:
            return self.agreed
        if self.policy.is_due or (self.watch is not None and self.watch.is_new(engine)):
            return True
        return self._writer is not None and self._writer.has_failed

    def save_if_requested(self, engine: Any) -> None:
        """Saves if it is requested, unless a window is open."""
        if self.background:
            on_rank_zero(lambda: self.writer.report_if_done())
        due = engine.coordinator.checkpoint_is_requested(engine, self)
        self.policy.requested = self.policy.requested or due  # the ranks compare later requests after the next iteration
        if due and not engine.window_is_open:
            self._save()

    def save_if_requested_after_epoch(self, engine: Any) -> None:
        """The same after an epoch, when the metric must have appeared."""
        if self.watch is not None:
            self.watch.check_exists(engine)
        self.save_if_requested(engine)

    @on(Events.COMPLETED, priority=Priority.SAVE)
    def finish(self, engine: Any) -> None:
        """Saves the end of a run if anything is new, with the gradients of an open window."""
        if engine.coordinator.any_rank(self.requests_checkpoint(engine) or self.policy.is_new(moment_of(engine))):
            self._save()
        if self.background:
            on_rank_zero(lambda: self.writer.close())
        engine.coordinator.barrier()  # no rank exits before the file is complete

    def check_at_end(self, engine: Any) -> None:
        """Raises ``ValueError`` if the metric has not appeared in the run."""
        assert self.watch is not None
        self.watch.check_at_end(engine)

    def _look_at_score(self, engine: Any) -> None:
        """Notes a new score, and requests a checkpoint if it is among the best."""
        if self.watch is None or not self.watch.is_new(engine):
            return
        score = self.watch.take(engine)
        if not self.policy.note_score(score, step_of(engine), engine.window_is_open) or not is_main_process():
            return
        self.writer.join()  # the other ranks wait: an error is reported where they hear of it
        if is_among_best(score, self.writer.index.entries, self.keep_best, self.mode):
            self.policy.requested = True

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Writes a checkpoint now; inside a run, at the end of the open window, after every other handler.

        In a handler of ``EXCEPTION_RAISED`` it is written now, because the window will not end. With several processes this is
        an error: the others may never come to it.

        Returns:
            The file; ``None`` if it is not written yet.

        Raises:
            RuntimeError: if the handler is not attached, or ranks would wait for each other after an exception.
        """
        if self.engine is None:
            raise RuntimeError(NOT_ATTACHED)
        if self.engine.is_running and self.engine.last_event_name != Events.EXCEPTION_RAISED:
            self.request()
            return None
        if self.engine.is_running and self.engine.coordinator.is_distributed:
            raise RuntimeError(
                "save() in EXCEPTION_RAISED would wait for the other processes, which may never come to it; resume from the "
                "last checkpoint, and save more often (every=, every_minutes=)"
            )
        path = self._save()
        return path if on_rank_zero(lambda: self.writer.close()) else None

    def _save(self) -> Path | None:
        engine = self.engine
        self.policy.requested = False
        entry = entry_of(engine, self.policy.take_score(step_of(engine), engine.window_is_open), self.mode, self.sharded)
        content = engine.checkpoint(self.sharded)
        path = self._write_shards(content, entry) if self.sharded else on_rank_zero(lambda: self.writer.write(content, entry))
        if path is not None:
            self.policy.saved(moment_of(engine))
        return path

    def _write_shards(self, content: dict[str, Any], entry: Entry) -> Path | None:
        """Every rank writes its part; then rank 0 updates the folder, or counts a failed save."""
        path, last = self.folder / entry.file, lambda: {"rotation": self.writer.prepare(entry)}
        result = partial(raise_if, error_of(lambda: save_shards(content, path, last)))
        return on_rank_zero(lambda: self.writer.record(entry, result, size_of(content)))

    @on(Events.EXCEPTION_RAISED)
    def on_exception(self, engine: Any, error: BaseException) -> None:
        """Saves nothing, but waits for a save in the background."""
        if self._writer is not None:
            self._writer.close()

    # -- resuming -----------------------------------------------------------------------------------------------------

    def resume(self, which: str | os.PathLike[str] = "auto", trainer: Any = None) -> Path | None:
        """Restores a checkpoint; the next ``run()`` resumes from there. The folder is not changed.

        Args:
            which: ``"auto"`` for the newest good checkpoint (a warning names the bad ones that are passed over), ``"best"``,
                or a path.
            trainer: the trainer to restore, if this handler is not attached: to evaluate a run, or look at it, while another
                process trains.

        Returns:
            The checkpoint that was loaded; ``None`` for ``"auto"`` in a folder without any checkpoint.

        Raises:
            RuntimeError: if there is no trainer, or it is running.
            CheckpointError: if the checkpoint cannot be used, or none in the folder can.
            FileNotFoundError: if the path does not exist.
            ValueError: if the checkpoint is of another model, optimizer or scheme; it is a ``CheckpointError``, too.
        """
        engine = self.engine if trainer is None else trainer
        if engine is None:
            raise RuntimeError(NO_TRAINER)
        if not hasattr(engine, "restore"):
            raise TypeError(f"trainer must be a trainer from create_trainer(), got {type(engine).__name__}")
        if engine.is_running:
            raise RuntimeError("resume() can't be called inside a run; call it before run()")

        def restore(content: Any) -> None:
            check_optimizers(engine.phases, content)
            engine.restore(content)

        path = load_chosen(lambda: self.index, which, self._mode_for, engine.sharding_reference, restore)
        if path is None:
            return None
        logger.info("resumed from %s: epoch %d, step %d", path, engine.state.epoch, engine.state.optimizer_step)
        return path
