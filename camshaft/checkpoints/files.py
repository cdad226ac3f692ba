"""Writing files that are complete or absent: to a temporary file first, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

__all__ = [
    "CHECKSUM_TAG",
    "CheckpointError",
    "MANIFEST",
    "TEMP_PREFIX",
    "check_name_lengths",
    "checksum",
    "delete",
    "remove",
    "remove_temporary_files",
    "save_durably",
    "sync_folder",
    "temporary_name",
    "version_of",
    "write_durably",
]

TEMP_PREFIX = ".camshaft-"
"""The prefix of the names of temporary files and folders; their suffix is ``.tmp``."""

REMOVED = ".removed"
"""In the name of a temporary folder: it is a checkpoint that is being deleted."""

CHECKSUM_TAG = b"camshaft crc32 "
"""The prefix of the zip comment that :func:`save_durably` adds; eight hexadecimal digits follow."""

MANIFEST = "checkpoint.pt"
"""The file in a sharded checkpoint that lists its other files. It is written last."""

NAME_LIMIT = 255
"""The longest name, in bytes, that the usual file systems allow."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the text names the file and says why."""


def write_durably(path: Path, write: Callable[[BinaryIO], None]) -> int:
    """Writes a file so that neither a kill nor a power cut leaves an incomplete one.

    The order is: a temporary file in the same folder, flush, fsync, rename, fsync of the folder. A failure removes the
    temporary file and leaves the previous content of ``path``.

    Args:
        path: the file; its folder must exist.
        write: called with a binary file object.

    Returns:
        The number of bytes written.

    Raises:
        OSError: as the file system raises it, or if the file's name is too long.
    """
    check_name_lengths(path)
    descriptor, temporary = tempfile.mkstemp(prefix=TEMP_PREFIX, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            size = file.tell()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return size


def check_name_lengths(path: Path) -> None:
    """Raises ``OSError`` if a part of a path is longer than file systems allow."""
    for part in path.parts:
        size = len(os.fsencode(part))
        if size > NAME_LIMIT:
            message = f"the name {part[:20] + '...'!r} has {size} bytes, and at most {NAME_LIMIT} are allowed"
            raise OSError(errno.ENAMETOOLONG, message, str(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries (a rename, a removal) to the disk, if the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_name(name: str, kind: str = "") -> str:
    """A new name for a temporary file or folder, which contains the name of the checkpoint it belongs to."""
    return f"{TEMP_PREFIX}{name}.{os.urandom(4).hex()}{kind}.tmp"


class _ChecksumWriter:
    """A binary file that computes a checksum of everything written, and ends with a zip comment that holds it.

    ``torch.save`` writes a zip file, whose last two bytes are the length of an empty comment. They are held back so that
    :meth:`finish` can add a comment. Readers of zip files ignore it, and it reveals any changed bit.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc32, self.tail = file, 0, b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            pending = self.tail + bytes(view)
            self._put(pending[:-2])
            self.tail = pending[-2:]
        else:
            self._put(self.tail)
            self._put(view[:-2])
            self.tail = bytes(view[-2:])
        return len(view)

    def _put(self, data: Any) -> None:
        if self.error is not None:
            return
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            self.file.write(data)
        except OSError as error:  # torch's zip writer would replace it with a RuntimeError of its own
            self.error = error

    def flush(self) -> None:
        """Does nothing: the complete file is flushed later."""

    def finish(self) -> None:
        """Ends the file; raises the first ``OSError`` of any write."""
        self._put(struct.pack("<H", len(CHECKSUM_TAG) + 8))
        self._put(CHECKSUM_TAG + b"%08x" % self.crc32)
        if self.error is not None:
            raise self.error


def save_durably(content: Any, path: Path) -> int:
    """``torch.save`` through :func:`write_durably`, with a checksum of the complete file at its end.

    Args:
        content: tensors and plain values.
        path: the file; any ``torch.load`` can read it.

    Returns:
        The number of bytes written.

    Raises:
        OSError: as the file system raises it, or if the file's name is too long.
    """

    def write(file: BinaryIO) -> None:
        checked = _ChecksumWriter(file)
        torch.save(content, cast(BinaryIO, checked))
        checked.finish()

    return write_durably(path, write)


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


def version_of(path: Path) -> tuple[int, int] | None:
    """Tells the file or folder that has this path now from one that replaces it later; ``None`` if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files and folders that interrupted saves have left in a folder."""
    for path in folder.glob(f"{TEMP_PREFIX}*.tmp"):
        with suppress(OSError):
            delete(path)


def remove(path: Path) -> None:
    """Deletes a checkpoint, which may not exist. A folder is renamed first, so that no incomplete one keeps the name."""
    if path.is_dir() and not path.is_symlink():
        removed = path.parent / temporary_name(path.name, REMOVED)
        os.replace(path, removed)
        path = removed
    delete(path)


def delete(path: Path) -> None:
    """Deletes a file or a folder. Of a symbolic link, only the link is deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
