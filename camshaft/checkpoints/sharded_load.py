"""Reading a sharded checkpoint: a folder in which every rank has written its own part, by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import MANIFEST, CheckpointError, checksum
from camshaft.checkpoints.names import step_of
from camshaft.distributed.collectives import host_group
from camshaft.distributed.dtensors import is_dtensor

__all__ = ["first_failure", "load_manifest", "load_shards", "read_metadata_file", "unflatten_tensors"]

ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
"""The modules of the classes in DCP's metadata."""
ALLOWED_GLOBALS = {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}
"""Other names in it, all without side effects."""

Reference = Callable[[str], "torch.Tensor | None"]


def load_manifest(path: Path) -> dict[str, Any]:
    """What the folder holds beside its tensors, if every byte of every file is as written.

    Raises:
        CheckpointError: says what is wrong with the folder.
    """
    if not (path / MANIFEST).is_file():
        checkpoints = [item.name for item in path.iterdir() if step_of(item.name) is not None]
        if checkpoints:
            newest = path / max(checkpoints, key=lambda name: step_of(name) or 0)
            raise CheckpointError(
                f"{path} is a folder of checkpoints, and not one of them; give the path of one, such as {newest}, or attach "
                f"CheckpointRotation({str(path)!r}) and call its resume('auto')"
            )
        raise CheckpointError(f"{path} is not a file, and as a folder it isn't whole: {MANIFEST} does not exist")
    manifest = load_checked(path / MANIFEST)
    for name, (size, crc32) in manifest["files"].items():
        part = path / name
        if not part.is_file():
            raise CheckpointError(f"{path} is damaged: {name} does not exist")
        if part.stat().st_size != size or checksum(part) != crc32:
            raise CheckpointError(f"{path} is damaged: the bytes of {name} don't match its checksum")
    read_metadata_file(path)
    return manifest  # type: ignore[no-any-return]


def load_shards(path: Path, manifest: dict[str, Any], reference: Reference, *, together: bool = True) -> dict[str, Any]:
    """The whole content of a folder; of sharded tensors each process reads its own part alone.

    Args:
        path: the folder.
        manifest: what :func:`load_manifest` gave, or as much of it as is wanted.
        reference: by the name of a tensor, one that is sharded as it is to be here, or ``None`` for a whole one.
        together: if several processes train, every one of them calls this, and an error of one is an error of all.
    """
    targets: dict[str, torch.Tensor] = {}

    def target(mark: Mapping[str, Any]) -> torch.Tensor:
        like = reference(mark["tensor"])
        if like is not None and is_dtensor(like) and tuple(like.shape) == tuple(mark["shape"]):
            targets[mark["tensor"]] = torch.zeros_like(like, dtype=mark["dtype"], requires_grad=False)
        else:
            targets[mark["tensor"]] = torch.empty(mark["shape"], dtype=mark["dtype"])
        return targets[mark["tensor"]]

    content = {**manifest, **{key: unflatten_tensors(manifest[key], target) for key in ("phases", "handlers")}}
    try:
        if together and dist.is_initialized():
            load(targets, storage_reader=_Reader(path), process_group=host_group())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is one process is no surprise
                load(targets, storage_reader=_Reader(path), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{path} can't be read: {first_failure(error)}") from error
    return content


def read_metadata_file(path: Path) -> Metadata:
    """DCP's own table of contents of a folder, which is a pickle: nothing in it is called but what such a table is made of.

    Raises:
        CheckpointError: if it names anything else, or the folder holds more than tensors.
    """
    try:
        with (path / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
        raise CheckpointError(f"{path} holds more than tensors, and was not loaded")
    return metadata  # type: ignore[no-any-return]


class _Reader(FileSystemReader):
    """DCP's reader, by a table of contents that has been looked at."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata_file(Path(self.path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format)):
            return getattr(torch, name)
        if (module, name) in ALLOWED_GLOBALS:
            return ALLOWED_GLOBALS[module, name]
        found = super().find_class(module, name) if module in ALLOWED_MODULES and "." not in name else None
        if isinstance(found, type) and found.__module__ == module:
            return found
        raise CheckpointError(f"a sharded checkpoint's table of contents names {module}.{name}, and was not loaded")


def unflatten_tensors(value: Any, target: Callable[[Mapping[str, Any]], torch.Tensor]) -> Any:
    """The reverse of :func:`flatten_tensors`; ``target`` gives the tensor for a mark."""
    if isinstance(value, Mapping):
        if set(value) == {"tensor", "shape", "dtype"}:
            return target(value)
        return {key: unflatten_tensors(item, target) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(unflatten_tensors(item, target) for item in value)
    return value


def first_failure(error: BaseException) -> str:
    """The text of the first failure in an error of DCP, which collects one per rank."""
    failures = getattr(error, "failures", {})
    found = [str(failure[0]) for failure in failures.values()]
    return found[0] if found else str(error)
