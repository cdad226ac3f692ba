"""Writes checkpoints into a folder, one after another, in the foreground or in a background thread."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from camshaft.checkpoints.files import remove, save_durably
from camshaft.checkpoints.index import Entry, Index
from camshaft.checkpoints.lock import FolderInUseError
from camshaft.checkpoints.names import EARLIEST_TIME
from camshaft.checkpoints.snapshot import Snapshot
from camshaft.pytree import tensors

__all__ = ["CheckpointWriter", "error_of", "raise_if", "size_of"]

logger = logging.getLogger("camshaft")

FAILURES = 3
"""After this many failed saves in a row the error is raised."""


class CheckpointWriter:
    """Writes a checkpoint, then the index, and only then deletes what the rotation no longer keeps.

    A save that fails leaves the older files unchanged and warns. The third in a row raises, and the first one too if nothing
    was ever saved in this folder. In the background the tensors are copied first and one thread writes them; an error is
    reported at the next save or at :meth:`wait`. The memory of the copy is kept for the next save until :meth:`close`, or
    until a save fails.

    Args:
        index: the folder's index.
        choose: which of the index's entries are kept.
        background: writes in a thread while training continues.
        check_owner: called before each save; raises if another run has taken the folder.
    """

    def __init__(
        self,
        index: Index,
        choose: Callable[[list[Entry]], list[Entry]],
        background: bool = False,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.index, self.choose, self.background, self.check_owner = index, choose, background, check_owner
        self.longest = 0.0
        """The duration of the longest save in seconds, from the request to the last deletion."""
        self._snapshot = Snapshot()
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: tuple[Path, int] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed and was not reported yet."""
        return self._error is not None

    def write(self, content: dict[str, Any], entry: Entry) -> Path | None:
        """Writes one checkpoint as a file.

        Args:
            content: tensors and plain values; the tensors may change as soon as this returns.
            entry: how the index lists it.

        Returns:
            The file; ``None`` if it could not be written. In the background it is not written yet.

        Raises:
            OSError: if this is the third save in a row that fails, or nothing was ever saved in this folder.
            RuntimeError: the same, if it did not fail because of the file system; or if another run has taken the folder.
        """

        def save(content: dict[str, Any]) -> None:
            save_durably({**content, "rotation": self.prepare(entry)}, self.index.folder / entry.file)

        if not self.background:
            return self.record(entry, lambda: save(content), size_of(content))
        self._begin(entry, size_of(content))
        try:
            fetch = self._snapshot.take(content)
            self._thread = threading.Thread(target=self._run, args=(entry, lambda: save(fetch())), name="camshaft checkpoint")
            self._thread.start()
        except Exception as error:  # out of memory, or of threads
            self._thread, self._error = None, error
            self._snapshot.release()
            return self.index.folder / entry.file if self._report() else None
        return self.index.folder / entry.file

    def record(self, entry: Entry, save: Callable[[], Any], size: int) -> Path | None:
        """Runs ``save``, which writes the checkpoint in the foreground, and updates the folder.

        Args:
            entry: how the index lists it.
            save: calls :meth:`prepare` before it gives the checkpoint its name.
            size: how many bytes it takes.

        Returns:
            The checkpoint; ``None`` if it could not be written. Raises as :meth:`write` does.
        """
        self._begin(entry, size)
        self._run(entry, save)
        return self.index.folder / entry.file if self._report() else None

    def prepare(self, entry: Entry) -> dict[str, Any]:
        """Must be called before a checkpoint gets its name. Numbers the save, and makes the index ready for it.

        If the name is listed already, the index on the disk is written without it. So a kill before the index is updated leaves
        an unlisted checkpoint, old or new, which tells its number itself.

        Returns:
            What the checkpoint says about itself.
        """
        self.check_owner()
        index = self.index
        index.saves = entry.written = min(index.saves + 1, EARLIEST_TIME - 1)
        if any(other.file == entry.file for other in index.entries) or not index.path.exists():
            index.write(without=entry.file)
        return {"identity": index.identity, "entry": dict(vars(entry))}

    def join(self) -> None:
        """Waits for a save in the background, and leaves its error to be reported by the next call of another method."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> bool:
        """Waits for a save in the background, if there is one, and reports its error.

        Returns:
            Whether the last save succeeded.
        """
        if self._thread is None:
            return True
        self._thread.join()
        self._thread = None
        return self._report()

    def close(self) -> bool:
        """The same, and frees the memory that is kept for the next save; a later save makes new memory."""
        try:
            return self.wait()
        finally:
            self._snapshot.release()

    def report_if_done(self) -> bool:
        """What :meth:`wait` does, without waiting: does nothing while a save is being written."""
        return True if self._thread is not None and self._thread.is_alive() else self.wait()

    def _begin(self, entry: Entry, size: int) -> None:
        self.wait()
        self._last = self.index.folder / entry.file, size

    def _run(self, entry: Entry, save: Callable[[], Any]) -> None:
        """One save, from the first byte to the last deletion; every exception is kept for :meth:`_report`."""
        started = time.monotonic()
        try:
            save()
            self.index.add(entry)
            self._rotate()
        except BaseException as error:
            if self._thread is threading.current_thread():
                if not isinstance(error, OSError):
                    logger.error("a save in the background has failed", exc_info=True)
                without_tracebacks(error)  # their frames refer to the copies of the tensors
                self._snapshot.release()
            self._error = error
        self.longest = max(self.longest, time.monotonic() - started)

    def _rotate(self) -> None:
        """Writes the index, and only then deletes. If this fails, the next save does it."""
        index, before = self.index, self.index.entries
        index.entries = self.choose(before)
        try:
            index.write()
        except BaseException:
            index.entries = before
            raise
        chosen = {entry.file for entry in index.entries}
        stuck = {entry.file for entry in before if entry.file not in chosen and not self._is_deleted(entry)}
        index.entries = [entry for entry in before if entry.file in chosen | stuck]

    def _is_deleted(self, entry: Entry) -> bool:
        try:
            remove(self.index.folder / entry.file)
        except OSError as error:
            logger.warning("%s can't be deleted (%s); the next save tries again", entry.file, error)
            return False
        return True

    def _report(self) -> bool:
        """Warns once about a save that has failed; raises if it is the third in a row, or nothing was ever saved."""
        error, self._error = self._error, None
        if error is None:
            self._failures = 0
            return True
        try:
            if isinstance(error, FolderInUseError) or not isinstance(error, Exception):
                raise error
            self._failures += 1
            message = self._failure(error)
            if not self.index.entries:
                raise failed(error, f"{message}; nothing was ever saved in this folder") from error
            if self._failures >= FAILURES:
                raise failed(error, f"{message}; {FAILURES} saves in a row have failed") from error
            warnings.warn(f"{message}; training continues", RuntimeWarning, stacklevel=5)
            return False
        finally:
            del error  # its traceback refers to this frame

    def _failure(self, error: Exception) -> str:
        """The text about a save that has failed."""
        assert self._last is not None
        path, needed = self._last
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
        except OSError:
            free = "the free space is unknown"
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        untouched = "; the earlier checkpoints are untouched" if self.index.entries else ""
        return f"the checkpoint {path} could not be written ({reason}): it takes about {needed:,} bytes, {free}{untouched}"


def failed(error: Exception, message: str) -> Exception:
    """The exception for a save that has failed for good."""
    if isinstance(error, OSError):
        return OSError(message) if error.errno is None else OSError(error.errno, message)
    return RuntimeError(message)


def without_tracebacks(error: BaseException | None) -> None:
    """Removes the tracebacks of an exception and of those that led to it."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def size_of(content: Any) -> int:
    """The bytes of all tensors in a nest."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(content))


def error_of(action: Callable[[], Any]) -> Exception | None:
    """Runs an action and returns the exception that it raises."""
    try:
        action()
    except Exception as error:
        return error
    return None


def raise_if(error: Exception | None) -> None:
    """Raises an exception, if there is one."""
    if error is not None:
        raise error
