"""The status of a trainer's run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = ["RunState", "RunStatus"]


class RunStatus(Enum):
    """What the next ``run()`` does, or the present one is doing."""

    NEW = "new"
    """It starts a run: the clocks begin at 0, unless an earlier run of the same trainer is extended."""
    RESUMED = "resumed"
    """A checkpoint has been loaded; it continues from there."""
    INTERRUPTED = "interrupted"
    """``interrupt()`` has paused the run; it continues inside the same epoch."""
    FINISHED = "finished"
    """The run has ended, by reaching its limit or by ``terminate()``."""
    FAILED = "failed"
    """An exception has left the run."""


@dataclass
class RunState:
    """The status of a trainer's run, and the checkpoint from which it will continue."""

    status: RunStatus = RunStatus.NEW
    checkpoint: Mapping[str, Any] | None = None
    """The content of the loaded checkpoint, until the run that continues from it has set up its data."""
    stop_requested: bool = False
    """Whether ``terminate()`` has been called in this run."""
    steps_before: int = 0
    """The number of optimizer steps made or skipped before this run."""
    length_is_learned: bool = False
    """Whether the length of an epoch is known because the data has ended once."""

    def loaded(self, checkpoint: Mapping[str, Any]) -> None:
        """A checkpoint has been loaded."""
        self.status, self.checkpoint = RunStatus.RESUMED, checkpoint

    def begin(self, status: RunStatus) -> None:
        """A run begins or continues."""
        if status is not RunStatus.INTERRUPTED:
            self.stop_requested = False
        self.status = status

    def end(self, is_interrupted: bool) -> None:
        """The run has been interrupted or has ended."""
        self.status = RunStatus.INTERRUPTED if is_interrupted else RunStatus.FINISHED

    def fail(self) -> None:
        """An exception has left the run. A checkpoint that it has not got to is still to be resumed from."""
        self.status = RunStatus.FAILED if self.checkpoint is None else RunStatus.RESUMED

    def take_checkpoint(self) -> Mapping[str, Any] | None:
        """Returns the loaded checkpoint, and forgets it."""
        checkpoint, self.checkpoint = self.checkpoint, None
        return checkpoint
