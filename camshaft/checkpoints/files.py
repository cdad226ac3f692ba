"""Writing files that are complete or absent: to a temporary file first, flushed to the disk, then renamed."""

from __future__ import annotations

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
    "checksum",
    "remove",
    "remove_temporary_files",
    "save_durably",
    "sync_folder",
    "write_durably",
]

TEMP_PREFIX = ".camshaft-"
"""What the names of temporary files begin with."""

CHECKSUM_TAG = b"camshaft crc32 "
"""What a sealed file's zip comment begins with; eight hexadecimal digits follow."""


MANIFEST = "checkpoint.pt"
"""Of a checkpoint that is a folder, the file that lists the others."""


class CheckpointError(RuntimeError):
    """A file that exists and can't be used, or does not exist; the text says why."""


def write_durably(path: Path, write: Callable[[BinaryIO], None]) -> int:
    """Puts a file in place so that neither a kill nor a power cut leaves half of it.

    The order is: a temporary file in the same folder, flush, fsync, rename, fsync of the folder. A failure removes the
    temporary file and leaves what was at ``path`` before.

    Args:
        path: the file; its folder must exist.
        write: called with a binary file object.

    Returns:
        The number of bytes written.

    Raises:
        OSError: as the file system raises it.
    """
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (a rename, a removal) reach the disk; a file system that can't is passed over."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _ChecksumWriter:
    """A binary file that sums what is written and ends it with a zip comment that holds the sum.

    ``torch.save`` writes a zip, whose last two bytes are the length of a comment that it leaves empty. They are held back,
    so that :meth:`seal` can put a comment there: readers of zips pass over it, and any changed bit is found.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc32, self.tail = file, 0, b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            held = self.tail + bytes(view)
            self._put(held[:-2])
            self.tail = held[-2:]
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
        except OSError as error:  # torch's zip writer would put a RuntimeError of its own in its place
            self.error = error

    def flush(self) -> None:
        """Nothing yet: the whole is flushed when it is sealed."""

    def seal(self) -> None:
        """Ends the file; an error of the file system in any write comes out here."""
        self._put(struct.pack("<H", len(CHECKSUM_TAG) + 8))
        self._put(CHECKSUM_TAG + b"%08x" % self.crc32)
        if self.error is not None:
            raise self.error


def save_durably(content: Any, path: Path) -> int:
    """``torch.save`` through :func:`write_durably`, sealed with a checksum of the whole file.

    Args:
        content: tensors and plain values.
        path: the file; any ``torch.load`` can read it.

    Returns:
        The number of bytes written.
    """

    def write(file: BinaryIO) -> None:
        sealed = _ChecksumWriter(file)
        torch.save(content, cast(BinaryIO, sealed))
        sealed.seal()

    return write_durably(path, write)


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files and folders that killed saves have left in a folder."""
    for path in folder.glob(f"{TEMP_PREFIX}*.tmp"):
        with suppress(OSError):
            remove(path)


def remove(path: Path) -> None:
    """Deletes a file that may be gone already, or a folder, which first gets a name that tells that it isn't whole."""
    if path.is_dir():
        litter = path if path.name.startswith(TEMP_PREFIX) else path.parent / f"{TEMP_PREFIX}{path.name}.old.tmp"
        if litter != path:
            os.replace(path, litter)
        shutil.rmtree(litter)
    else:
        path.unlink(missing_ok=True)
