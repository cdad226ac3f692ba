"""What became of the other processes of a run."""

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
"""What an error says that has come up between the processes: gloo's texts begin with the place in its source."""


PEER_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|remote process|communicator was aborted", re.IGNORECASE)
"""What such a one says where another process has left."""


SECONDS_TO_WAIT = 3.0
"""For so many seconds a process that has lost another one asks what became of it."""


class Failures:
    """Tells the processes of one run which of them has failed, and why: it is written down before that one leaves."""

    def __init__(self) -> None:
        self.key = f"camshaft/failure/{next(_runs)}"
        self.store = _store()

    def leave(self, error: BaseException, where: str) -> BaseException:
        """What a process raises that leaves a run by an exception; it waits for nobody.

        Args:
            error: the exception.
            where: the place in the run.

        Returns:
            ``error`` itself, which is written down for the others; or if it came of another process's failure, a
            ``RuntimeError`` that names that one.
        """
        found = self._read() if is_communication_error(error) else None
        if found is None and is_communication_error(error) and PEER_GONE.search(str(error)):
            found = "another process has left the run without a word (killed, or out of memory?)"
        if found is None:
            self._write(f"rank {rank()} failed {where}: {type(error).__name__}: {error}")
            return error
        named = RuntimeError(f"{found}; rank {rank()} can't continue without it, {where}")
        named.__cause__ = error
        return named

    def _write(self, text: str) -> None:
        if self.store is not None:
            try:
                self.store.compare_set(self.key, "", text)
            except RuntimeError:  # the store has gone with the process that kept it
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
    """Whether an error has come up between the processes, so that another one's failure may be behind it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and COMMUNICATION_ERROR.search(str(error)) is not None
    )


def _store() -> Any:
    """The key-value store through which the processes have found each other."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
