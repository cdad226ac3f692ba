"""DCP's own table of contents of a sharded checkpoint (``.metadata``), read without unpickling it and checked.

It is a pickle of a few record types. They are made here, from values that have been checked, and nothing in it is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from camshaft.checkpoints.archive import dtype_of, is_size
from camshaft.checkpoints.file_load import open_regular
from camshaft.checkpoints.files import CheckpointError
from camshaft.checkpoints.pickle_scan import Call, Global, scan_pickle
from camshaft.checkpoints.text import printable

__all__ = ["read_metadata_file"]

METADATA = "torch.distributed.checkpoint.metadata."
RECORDS = frozenset(
    {
        *(f"{METADATA}{name}" for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
        *(f"{METADATA}{name}" for name in ("BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.Size",
        "torch.serialization._get_layout",
    }
)
"""All that such a table is made of, apart from plain values and dtypes."""


def read_metadata_file(path: Path, sizes: Mapping[str, int] | None = None) -> Metadata:
    """Reads the table of contents of a folder.

    Args:
        path: the folder.
        sizes: the bytes of each file of the folder, by name; by default those that are in the folder.

    Raises:
        CheckpointError: if it is damaged, names anything else, or describes tensors that the folder does not have.
    """
    try:
        with open_regular(path / ".metadata") as file:
            data = file.read()
        if sizes is None:
            sizes = {part.name: part.stat().st_size for part in path.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    try:
        table = scan_pickle(data, lambda name: name in RECORDS or dtype_of(name) is not None, Call, _no_storage)
        return _metadata(table, sizes)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: .metadata: {printable(str(error))}") from error


def _no_storage(_: Any) -> Any:
    raise CheckpointError("it refers to a storage")


def _fields(value: Any, name: str) -> Mapping[str, Any]:
    """The fields of a record of a type."""
    if type(value) is not Call or value.name.rpartition(".")[2] != name or type(value.state) is not dict:
        raise CheckpointError(f"it holds another kind of record than {name}")
    return cast("Mapping[str, Any]", value.state)


def _shape(value: Any, what: str) -> torch.Size:
    sizes = value.args[0] if type(value) is Call and value.name == "torch.Size" and len(value.args) == 1 else value
    if not is_size(sizes):
        raise CheckpointError(f"{what} is not a shape")
    return torch.Size(sizes)


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise CheckpointError(f"{what} must be an integer of at least 0")
    return value


def _metadata(table: Any, sizes: Mapping[str, int]) -> Metadata:
    fields = _fields(table, "Metadata")
    tensors, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(tensors) is not dict or type(storage) is not dict or not all(type(name) is str for name in tensors):
        raise CheckpointError("state_dict_metadata and storage_data must be dicts")
    described = {name: _tensor(name, value) for name, value in tensors.items()}
    version = fields.get("version")
    metadata = Metadata(
        state_dict_metadata=dict(described),
        planner_data={},
        storage_data=_storage(storage, described, sizes),
        storage_meta=StorageMeta(),
        version=version if type(version) is str else None,
    )
    _check_complete(described, metadata.storage_data)
    return metadata


def _tensor(name: str, value: Any) -> TensorStorageMetadata:
    """The record of a tensor, whose chunks lie inside its shape."""
    if type(value) is Call and value.name == f"{METADATA}BytesStorageMetadata":
        raise CheckpointError(f"{name!r} is no tensor: it holds more than tensors, and was not loaded")
    fields = _fields(value, "TensorStorageMetadata")
    properties, size, chunks = fields.get("properties"), _shape(fields.get("size"), f"size of {name!r}"), fields.get("chunks")
    state = properties.state if type(properties) is Call and properties.name == f"{METADATA}TensorProperties" else None
    dtype = dtype_of(state[0].name) if type(state) is tuple and state and type(state[0]) is Global else None
    if dtype is None or type(chunks) is not list:
        raise CheckpointError(f"{name!r} has no dtype or no chunks")
    made = [_chunk(name, chunk, size) for chunk in chunks]
    if sum(math.prod(chunk.sizes) for chunk in made) != math.prod(size):
        raise CheckpointError(f"the chunks of {name!r} are not the complete tensor")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, made)


def _chunk(name: str, value: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    offsets, sizes = (_shape(fields.get(key), f"{key} of a chunk of {name!r}") for key in ("offsets", "sizes"))
    inside = all(offset + length <= total for offset, length, total in zip(offsets, sizes, size, strict=False))
    if not len(offsets) == len(sizes) == len(size) or not inside:
        raise CheckpointError(f"a chunk of {name!r} lies outside of the tensor's shape {tuple(size)}")
    return ChunkStorageMetadata(offsets, sizes)


def _storage(
    storage: Mapping[Any, Any], tensors: Mapping[str, TensorStorageMetadata], sizes: Mapping[str, int]
) -> dict[MetadataIndex, _StorageInfo]:
    """Where each chunk is: in a file of this folder, inside its bytes, and no two in the same."""
    found: dict[MetadataIndex, _StorageInfo] = {}
    for key, value in storage.items():
        index = _fields(key, "MetadataIndex")
        name, offset = index.get("fqn"), index.get("offset")
        if type(name) is not str or name not in tensors or offset is None:
            raise CheckpointError("storage_data names a tensor that does not exist")
        info = _fields(value, "_StorageInfo")
        part = info.get("relative_path")
        if type(part) is not str or part not in sizes or not part.endswith(".distcp") or info.get("transform_descriptors"):
            raise CheckpointError(f"relative_path must be a file of the folder, got {str(part)[:100]!r}")
        start, length = _count(info.get("offset"), "offset"), _count(info.get("length"), "length")
        if start + length > sizes[part]:
            raise CheckpointError(f"a chunk of {name!r} lies outside of {part}")
        found[MetadataIndex(name, _shape(offset, "offset"))] = _StorageInfo(part, start, length)
    used = sorted((info.relative_path, info.offset, info.length) for info in found.values())
    for (part, start, length), (following, begin, _) in zip(used, used[1:], strict=False):
        if part == following and start + length > begin:
            raise CheckpointError(f"two chunks overlap in {part}")
    return found


def _check_complete(tensors: Mapping[str, TensorStorageMetadata], storage: Mapping[MetadataIndex, _StorageInfo]) -> None:
    """Each chunk has bytes in a file, as many as it needs: so tensors take no more memory than the files have bytes."""
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            info = storage.get(MetadataIndex(name, chunk.offsets))
            if info is None or info.length < math.prod(chunk.sizes) * tensor.properties.dtype.itemsize:
                raise CheckpointError(f"a chunk of {name!r} is larger than its part of the file")
