"""Reading a file that :mod:`camshaft.checkpoints.files` has written: checked byte by byte, and without running code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from camshaft.checkpoints.archive import check_archive
from camshaft.checkpoints.files import CHECKSUM_TAG, CheckpointError
from camshaft.checkpoints.text import printable

__all__ = ["load_checked", "open_regular", "read_json"]


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; pipes, devices and sockets are refused without opening them.

    Raises:
        CheckpointError: if it is anything else, or cannot be read.
        FileNotFoundError: if it does not exist.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a file")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced in between
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> Any:
    """Reads a JSON file. Objects take more memory than their text, so that a text that consists of them is refused.

    Raises:
        CheckpointError: if it is not a regular file.
        FileNotFoundError: if it does not exist.
        ValueError: if it is not JSON.
    """
    with open_regular(path) as file:
        text = file.read().decode()
    if text.count("{") + text.count("[") > 100 + len(text) // 50 or text.count(",") > 100 + len(text) // 6:
        raise ValueError("it consists of more objects than an index does")
    return json.loads(text)


def load_checked(path: Path, *, sealed: bool = True) -> Any:
    """Loads a file on the CPU, runs no code, and only if every byte is as written.

    Args:
        path: the file.
        sealed: whether it must have been written by :func:`save_durably`; otherwise the zip's own checksums are used if it has
            no checksum of the complete file.

    Returns:
        The content.

    Raises:
        CheckpointError: says what is wrong with the file.
        FileNotFoundError: if it does not exist.
    """
    with open_regular(path) as file:
        try:
            check_file(file, sealed)
            file.seek(0)
            with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
                return torch.load(file, map_location="cpu", weights_only=True)
        except CheckpointError as error:
            raise CheckpointError(f"{path} {printable(str(error))}") from error
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{path} is damaged or no checkpoint: {printable(str(error))}") from error
        except pickle.UnpicklingError as error:
            text = "holds more than tensors and plain values, and was not loaded"
            raise CheckpointError(f"{path} {text}: {printable(str(error))}") from error
        except Exception as error:  # a damaged file can make its reader fail in any way
            if isinstance(error, OSError) and error.errno == errno.ENOENT:
                raise
            raise CheckpointError(f"{path} can't be read: {printable(str(error))}") from error


def check_file(file: BinaryIO, sealed: bool) -> None:
    """Checks the checksums of a file, and then its structure. Raises ``CheckpointError`` without the path."""
    size = file.seek(0, os.SEEK_END)
    directory = getattr(zipfile, "_EndRecData")(file)  # noqa: B009  (not part of its types)
    if directory and directory[5] > size // 2:  # its entries take more memory than bytes in the file
        raise CheckpointError("is damaged or no checkpoint: it consists of its table of contents")
    with zipfile.ZipFile(file) as archive:
        if archive.comment.startswith(CHECKSUM_TAG):
            _check_checksum(file, size, archive.comment)
            check_archive(file, archive, is_foreign=not sealed)
            return
        if sealed:
            raise CheckpointError("is damaged or no checkpoint: it doesn't end with its checksum")
        check_archive(file, archive, is_foreign=True)
        if (broken := archive.testzip()) is not None:
            raise CheckpointError(f"is damaged: {broken} doesn't match its checksum")


def _check_checksum(file: BinaryIO, size: int, comment: bytes) -> None:
    left, crc32 = size - len(comment), 0
    file.seek(0)
    while left and (block := file.read(min(left, 1 << 20))):
        crc32, left = zlib.crc32(block, crc32), left - len(block)
    if comment != CHECKSUM_TAG + b"%08x" % crc32:
        raise CheckpointError("is damaged: its bytes don't match its checksum")
