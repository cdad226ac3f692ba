"""Checks of the files of a sharded checkpoint, before any of its tensors is read."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from camshaft.checkpoints.archive import check_archive, is_size
from camshaft.checkpoints.file_load import open_regular
from camshaft.checkpoints.files import CheckpointError, checksum
from camshaft.checkpoints.text import printable

__all__ = ["check_part", "check_placeholders", "check_slices"]


class _Slice(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if self.position < 0:
            raise OSError("a position before the beginning of the file")
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.position)
        data = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def check_part(path: Path, name: Any, entry: Any) -> None:
    """Checks the size and the checksum of a file that the manifest lists. It must be in the folder itself."""
    is_name = (
        isinstance(name, str) and "/" not in name and "\0" not in name and (name == ".metadata" or name.endswith(".distcp"))
    )
    is_entry = isinstance(entry, (list, tuple)) and len(entry) == 2 and all(type(item) is int for item in entry)
    if not is_name or not is_entry:
        raise CheckpointError(f"{path} is damaged: its manifest lists the file {str(name)[:100]!r}")
    part = path / name
    try:
        if part.is_symlink():
            raise CheckpointError(f"{path} is damaged: {name} is a symbolic link")
        with open_regular(part) as file:
            size = file.seek(0, 2)
        if size != entry[0] or checksum(part) != entry[1]:
            raise CheckpointError(f"{path} is damaged: the bytes of {name} don't match its checksum")
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {name} does not exist") from error


def check_slices(path: Path, metadata: Metadata) -> None:
    """Checks the structure of each tensor's file inside the parts."""
    for index, info in metadata.storage_data.items():
        with open_regular(path / info.relative_path) as file:
            part = io.BufferedReader(_Slice(file, info.offset, info.length))
            try:
                with zipfile.ZipFile(part) as archive:
                    check_archive(cast(BinaryIO, part), archive, is_foreign=False)
            except CheckpointError as error:
                raise CheckpointError(f"{path} is damaged: {index.fqn[:200]!r} {error}") from error
            except Exception as error:  # a damaged file can make its reader fail in any way
                raise CheckpointError(
                    f"{path} is damaged: {index.fqn[:200]!r} can't be read: {printable(str(error))}"
                ) from error


def check_placeholders(path: Path, value: Any, name: str, metadata: Metadata) -> None:
    """Checks that the tensors in the manifest are those of the table of contents."""
    if isinstance(value, Mapping):
        if set(value) == {"tensor", "shape", "dtype"}:
            tensor = metadata.state_dict_metadata.get(name)
            if value["tensor"] != name or not isinstance(tensor, TensorStorageMetadata):
                raise CheckpointError(f"{path} is damaged: its table of contents has no tensor {name[:200]!r}")
            shape = value["shape"]
            if not is_size(shape) or tuple(shape) != tuple(tensor.size) or value["dtype"] != tensor.properties.dtype:
                raise CheckpointError(f"{path} is damaged: {name[:200]!r} has another shape or dtype in its table of contents")
            return
        for key, item in value.items():
            check_placeholders(path, item, f"{name}/{key}", metadata)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            check_placeholders(path, item, f"{name}/{number}", metadata)
