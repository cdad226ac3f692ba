"""Finds out which rank failed first when communication between the ranks breaks."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import torch.distributed as dist

from camshaft.distributed.collectives import rank

__all__ = ["Failures"]

_runs = itertools.count()

COMMUNICATION_ERROR = re.compile(
    r"\bgloo[/\\]|ProcessGroup(Gloo|NCCL)|\bNCCL (error|communicator|operation)|collective operation|monitoredBarrier"
)
"""Texts of errors in communication between ranks. Those of gloo begin with a location in its source."""

CONNECTION_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|remote process|communicator was aborted", re.IGNORECASE
)
"""Texts of communication errors after the end of another process."""

SECONDS_TO_WAIT = 3.0
"""How many seconds a rank waits, after a communication error, for another rank's report of its failure."""


class Failures:
    """The failure of one run, shared by its ranks: a rank that fails reports why, and the others name it in their errors."""

    def __init__(self) -> None:
        self.key = f"camshaft/failure/{next(_runs)}"
        self.store = _store()

    def attribute(self, error: BaseException, where: str) -> BaseException:
        """The exception that a rank must raise when its run fails. It waits at most a few seconds for other ranks.

        Args:
            error: the exception that ended the run on this rank.
            where: the epoch and iteration, such as ``"in epoch 1, iteration 4"``.

        Returns:
            ``error`` itself, which is reported to the other ranks. If the failure of another rank has caused it, a
            ``RuntimeError`` that names that rank.
        """
        cause = self._read() if is_communication_error(error) else None
        if cause is None and is_communication_error(error) and CONNECTION_LOST.search(str(error)):
            cause = "another process ended without reporting an error (killed, or out of memory?)"
        if cause is None:
            self._report(f"rank {rank()} failed {where}: {type(error).__name__}: {error}")
            return error
        attributed = RuntimeError(f"{cause}; rank {rank()} can't continue without it, {where}")
        attributed.__cause__ = error
        return attributed

    def _report(self, text: str) -> None:
        if self.store is not None:
            try:
                self.store.compare_set(self.key, "", text)
            except RuntimeError:  # the process that holds the store has ended
                self.store = None

    def _read(self) -> str | None:
        until = time.monotonic() + SECONDS_TO_WAIT
        while self.store is not None and time.monotonic() < until:
            try:
                if self.store.check([self.key]):
                    return str(self.store.get(self.key).decode())
            except RuntimeError:
                return None
            time.sleep(0.05)
        return None


def is_communication_error(error: BaseException) -> bool:
    """Whether an error came from communication between ranks, so that the failure of another rank may have caused it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and COMMUNICATION_ERROR.search(str(error)) is not None
    )


def _store() -> Any:
    """The key-value store of the process group."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
