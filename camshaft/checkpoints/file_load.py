"""Reading a file that :mod:`camshaft.checkpoints.files` has written: checked byte by byte, and without running code."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from camshaft.checkpoints.files import CHECKSUM_TAG, CheckpointError

__all__ = ["load_checked"]


def load_checked(path: Path, *, sealed: bool = True) -> Any:
    """Loads a file on the CPU, runs no code, and only if every byte is as written.

    Args:
        path: the file.
        sealed: whether it must have been written by :func:`save_durably`; otherwise the zip's own checksums serve where
            there is no seal.

    Returns:
        The content.

    Raises:
        CheckpointError: says what is wrong with the file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.comment.startswith(CHECKSUM_TAG):
                _check_seal(path, archive.comment)
            elif sealed:
                raise CheckpointError(f"{path} is damaged or no checkpoint: it doesn't end with its checksum")
            elif (broken := archive.testzip()) is not None:
                raise CheckpointError(f"{path} is damaged: {broken} doesn't match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values, and was not loaded: {error}") from error
    except Exception as error:  # whatever a damaged file makes a reader stumble over
        raise CheckpointError(f"{path} can't be read: {error}") from error


def _check_seal(path: Path, comment: bytes) -> None:
    left, crc32 = path.stat().st_size - len(comment), 0
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            crc32, left = zlib.crc32(block, crc32), left - len(block)
    if comment != CHECKSUM_TAG + b"%08x" % crc32:
        raise CheckpointError(f"{path} is damaged: its bytes don't match its checksum")
