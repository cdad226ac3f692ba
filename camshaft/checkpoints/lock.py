"""One owner for each folder of checkpoints: a lock that the operating system releases when its process ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import warnings
import weakref
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["FolderInUseError", "FolderLock", "LOCK"]

LOCK = ".camshaft.lock"
"""The name of the lock file. It stays in the folder and says who was the last owner; it is the kernel's lock that counts."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
"""The errors of file systems that have no locks."""

_owners: weakref.WeakValueDictionary[str, FolderLock] = weakref.WeakValueDictionary()
"""The locks that this process holds, by the folder's real path."""


class FolderInUseError(RuntimeError):
    """Another run writes its checkpoints into this folder."""


class FolderLock:
    """The right to write into a folder, which one run has at a time.

    It is held from :meth:`acquire` to :meth:`release`, to the end of the process, or until the trainer is garbage. Forked
    processes (DataLoader workers) don't inherit it. Within one process, a later owner takes the folder over unless the earlier
    one is running: so a cell of a notebook can be executed again.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.was_taken_over = False
        self._lock: BaseFileLock | None = None
        self._file: tuple[int, int] | None = None
        self._owner: weakref.ref[Any] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def acquire(self, owner: Any) -> None:
        """Takes the folder for a trainer.

        Args:
            owner: the trainer. While its ``is_running`` is true, nobody in this process can take the folder over.

        Raises:
            FolderInUseError: if another run has the folder; names its host and process.
            OSError: if the lock file cannot be written.
        """
        key = os.path.realpath(self.folder)
        earlier = _owners.get(key)
        if earlier is not None and earlier is not self:
            earlier._hand_over(owner)
        self._lock, self.was_taken_over = self._locked(), False
        self._owner, self._finalizer = weakref.ref(owner), weakref.finalize(owner, self._unlock)
        self._finalizer.atexit = False  # the end of the process releases it anyway
        _owners[key] = self

    def check(self) -> None:
        """Makes sure, before a write, that the folder still belongs to this run; a folder that was made again is locked again.

        Raises:
            FolderInUseError: if another run has taken the folder.
            OSError: if the folder or the lock file cannot be written.
        """
        if self.was_taken_over:
            raise FolderInUseError(
                f"{self.folder} belongs to a CheckpointRotation that was attached later, or runs; detach() that one, or give "
                "each run a folder of its own"
            )
        if self._lock is not None and not self._is_in_place():
            self._unlock()
            self._lock = self._locked()

    def release(self) -> None:
        """Gives the folder back; does nothing if it is not held."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._owner = self._finalizer = None
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release(force=True)

    def _hand_over(self, owner: Any) -> None:
        """Releases the folder for another handler of this process."""
        current = None if self._owner is None else self._owner()
        if current is not None and (current is owner or getattr(current, "is_running", False)):
            raise FolderInUseError(
                f"{self.folder} is in use by a CheckpointRotation of "
                f"{'the same trainer' if current is owner else 'a trainer that is running in this process'}; "
                "give each one a folder of its own"
            )
        self.release()
        self.was_taken_over = True

    def _is_in_place(self) -> bool:
        """Whether the lock file is still the one that is locked: somebody may have deleted the folder and made it again."""
        with suppress(OSError):
            found = os.stat(self.folder / LOCK)
            return (found.st_dev, found.st_ino) == self._file
        return False

    def _locked(self) -> BaseFileLock | None:
        """A lock that is held; ``None``, with a warning, on a file system without locks."""
        from filelock import FileLock, Timeout  # takes 30 ms, and only a run that writes needs it

        lock = FileLock(
            self.folder / LOCK,
            timeout=0,
            thread_local=False,
            mode=stat.S_IMODE(os.stat(self.folder).st_mode) & 0o666,  # who may write into the folder may lock it
            on_acquired=self._sign,
        )
        try:
            lock.acquire()
        except Timeout:
            raise FolderInUseError(self._in_use()) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {self.folder} has no locks ({error.strerror}): make sure that no other run writes there",
                RuntimeWarning,
                stacklevel=6,
            )
            return None
        return lock

    def _sign(self, descriptor: int) -> None:
        """Writes into the lock file who holds it."""
        found = os.fstat(descriptor)
        self._file = found.st_dev, found.st_ino
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk is no reason to have no lock
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode())

    def _in_use(self) -> str:
        """The text of the error for a folder that another process holds."""
        who = "another process"
        with suppress(OSError, ValueError, KeyError, TypeError), open(self.folder / LOCK, "rb") as file:
            signed = json.loads(file.read(1000))
            who = f"process {int(signed['pid'])} on host {str(signed['host'])[:100]!r}, since {str(signed['since'])[:40]!r}"
        return (
            f"{self.folder} is in use: {who}, writes its checkpoints there. Stop that run, or give this one another dirname. "
            "To only read, don't attach: CheckpointRotation(dirname).last, .best and .resume(which, trainer) need no lock"
        )
