"""Writes checkpoints into a folder, one after another, in front of training or behind it."""

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
from camshaft.pytree import map_tensors, tensors

__all__ = ["CheckpointWriter"]

logger = logging.getLogger("camshaft")

FAILURES = 3
"""After this many failed saves in a row the error is raised."""


class CheckpointWriter:
    """Writes a checkpoint, then the index, and only then deletes what the rotation no longer keeps.

    A save that fails leaves the older files as they are and warns; the third in a row raises. In the background the tensors
    are copied first, one thread writes them, and what went wrong is said at the next save or at :meth:`wait`.

    Args:
        index: the folder's index.
        choose: which of the index's entries are kept.
        background: writes behind training.
        save: writes the content to a path; by default as a file.
    """

    def __init__(
        self,
        index: Index,
        choose: Callable[[list[Entry]], list[Entry]],
        background: bool = False,
        save: Callable[[dict[str, Any], Path], Any] | None = None,
    ) -> None:
        self.index, self.choose, self.background, self.save = index, choose, background, save
        self.longest = 0.0
        """How many seconds the longest save has taken, from the request to the last deletion."""
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._last: tuple[Path, int] | None = None

    def write(self, content: dict[str, Any], entry: Entry) -> Path | None:
        """Writes one checkpoint.

        Args:
            content: tensors and plain values; the tensors may change as soon as this returns.
            entry: how the index lists it.

        Returns:
            The file; ``None`` if it couldn't be written. In the background it is still to come.

        Raises:
            OSError: if this is the third save in a row that fails.
        """
        self.wait()
        started = time.monotonic()
        path = self.index.folder / entry.file
        self._last = path, sum(tensor.numel() * tensor.element_size() for tensor in tensors(content))
        if not self.background:
            self._put(content, entry, started)
            return path if self._report() else None
        copied = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), content)
        self._thread = threading.Thread(target=self._put, args=(copied, entry, started), name="camshaft checkpoint")
        self._thread.start()
        return path

    def wait(self) -> bool:
        """Waits for a save in the background, if there is one, and says what went wrong with it.

        Returns:
            Whether the last save succeeded.
        """
        if self._thread is None:
            return True
        self._thread.join()
        self._thread = None
        return self._report()

    def report_if_done(self) -> bool:
        """The same without waiting: a save that is still being written is left alone."""
        return True if self._thread is not None and self._thread.is_alive() else self.wait()

    def _put(self, content: dict[str, Any], entry: Entry, started: float) -> None:
        index = self.index
        try:
            if not index.path.exists():
                index.write()
            (self.save or save_durably)(content, index.folder / entry.file)
            index.add(entry)
            self._rotate()
        except OSError as error:
            self._error = error
        self.longest = max(self.longest, time.monotonic() - started)

    def _rotate(self) -> None:
        """Writes the index, and only then deletes; what goes wrong here is made up for with the next save."""
        index, before = self.index, self.index.entries
        index.entries = self.choose(before)
        try:
            index.write()
        except OSError:
            index.entries = before
            raise
        chosen = {entry.file for entry in index.entries}
        stuck = {entry.file for entry in before if entry.file not in chosen and not self._is_deleted(entry)}
        index.entries = [entry for entry in before if entry.file in chosen | stuck]

    def _is_deleted(self, entry: Entry) -> bool:
        try:
            remove(self.index.folder / entry.file)
        except OSError as error:
            logger.warning("%s can't be deleted (%s); it is tried again with the next checkpoint", entry.file, error)
            return False
        return True

    def _report(self) -> bool:
        """One clear warning for a save that has failed; the third in a row is raised."""
        error, self._error = self._error, None
        if error is None:
            self._failures = 0
            return True
        assert self._last is not None
        path, needed = self._last
        self._failures += 1
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
        except OSError:
            free = "the folder can't be looked at"
        message = (
            f"the checkpoint {path} could not be written ({error.strerror or error}): it takes about {needed:,} bytes, {free}; "
            "the earlier checkpoints are untouched"
        )
        if self._failures >= FAILURES:
            raise OSError(error.errno, f"{message}; {FAILURES} saves in a row have failed", str(path)) from error
        warnings.warn(f"{message}; training continues", RuntimeWarning, stacklevel=4)
        return False
