"""Checkpoints that every process writes its part of: a folder by ``torch.distributed.checkpoint``, whole or not there."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from camshaft.checkpoints.files import MANIFEST, TEMP_PREFIX, CheckpointError, load_checked, save_durably, sync_folder
from camshaft.checkpoints.index import step_of
from camshaft.distributed.collectives import all_gather_object, broadcast_object, host_group, is_main_process, rank
from camshaft.distributed.dtensors import is_dtensor

__all__ = ["load_manifest", "load_shards", "save_shards"]

ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
"""If the classes of DCP's own table of contents come from."""
ALLOWED_GLOBALS = {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}
"""What else it names, none of which does anything."""

Reference = Callable[[str], "torch.Tensor | None"]


def save_shards(content: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint as a folder; every process must call it, and each writes its own part.

    The order is that of a file: a temporary folder beside it, each file flushed to the disk, the manifest last, a rename.

    Args:
        content: tensors, sharded or not, and plain values. Those that aren't sharded are written as rank 0 has them.
        path: the folder; one that is there gives way.

    Raises:
        OSError: on every process if any of them could not write.
    """
    temporary = path.parent / f"{TEMP_PREFIX}{path.name}.tmp"
    held: dict[str, torch.Tensor] = {}
    rest = flatten_tensors({key: content[key] for key in ("phases", "handlers")}, "", held)
    if not is_main_process():  # DCP would take a BatchNorm's statistics from whichever process has the least to write
        held = {name: tensor for name, tensor in held.items() if is_dtensor(tensor)}
    problem = _attempt(lambda: _begin(temporary))
    if problem is None:
        try:
            writer = _Writer(temporary, sync_files=True)
            if dist.is_initialized():
                save(held, storage_writer=writer, process_group=host_group())
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    save(held, storage_writer=writer, no_dist=True)
        except CheckpointException as error:  # on every process at once
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"the parts of {path} could not be written: {_first_line(error)}") from error
        sums, problem = _gathered_sums(temporary)
        if problem is None:
            problem = _attempt(lambda: _end(temporary, path, {**content, **rest, "files": sums}))
    if problem is not None:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(problem)


class _Writer(FileSystemWriter):
    """DCP's writer, which doesn't note the folder's path: it is renamed, and may be moved."""

    def storage_meta(self) -> None:
        return None


def _attempt(action: Callable[[], None]) -> str | None:
    """What went wrong when the first process did something, for all of them."""
    problem = None
    if is_main_process():
        try:
            action()
        except OSError as error:
            problem = str(error)
    return broadcast_object(problem) if dist.is_initialized() else problem


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()


def _end(temporary: Path, path: Path, manifest: dict[str, Any]) -> None:
    save_durably(manifest, temporary / MANIFEST)
    replaced = path.parent / f"{TEMP_PREFIX}{path.name}.old.tmp"
    if path.exists():
        os.replace(path, replaced)
    try:
        os.replace(temporary, path)
    except OSError:
        if replaced.exists():
            os.replace(replaced, path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    failures = getattr(error, "failures", {})
    found = [str(failure[0]) for failure in failures.values()]
    return found[0] if found else str(error)


def _gathered_sums(folder: Path) -> tuple[dict[str, list[int]], str | None]:
    """Each file's size and CRC-32, summed up by the process that wrote it; and what went wrong on any of them."""
    sums: dict[str, list[int]] = {}
    problem = None
    try:
        for path in folder.iterdir():
            if path.name.startswith(f"__{rank()}_") or (is_main_process() and path.name == ".metadata"):
                sums[path.name] = [path.stat().st_size, checksum(path)]
    except OSError as error:  # the others wait for these sums
        problem = f"rank {rank()} could not read again what it has written: {error}"
    parts = all_gather_object((sums, problem)) if dist.is_initialized() else [(sums, problem)]
    problems = [text for _, text in parts if text is not None]
    return {name: value for part, _ in parts for name, value in part.items()}, problems[0] if problems else None


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


# -- reading --------------------------------------------------------------------------------------------------------------


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
        raise CheckpointError(f"{path} can't be read: {_first_line(error)}") from error
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


# -- taking apart ---------------------------------------------------------------------------------------------------------


def flatten_tensors(value: Any, name: str, held: dict[str, torch.Tensor]) -> Any:
    """``value`` with a mark in place of each tensor, which goes to ``held`` under its place's name."""
    if isinstance(value, torch.Tensor):
        held[name] = value.detach()
        return {"tensor": name, "shape": list(value.shape), "dtype": value.dtype}
    if isinstance(value, Mapping):
        return {key: flatten_tensors(item, f"{name}/{key}", held) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(flatten_tensors(item, f"{name}/{number}", held) for number, item in enumerate(value))
    return value


def unflatten_tensors(value: Any, target: Callable[[Mapping[str, Any]], torch.Tensor]) -> Any:
    """The reverse of :func:`flatten_tensors`; ``target`` gives the tensor for a mark."""
    if isinstance(value, Mapping):
        if set(value) == {"tensor", "shape", "dtype"}:
            return target(value)
        return {key: unflatten_tensors(item, target) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(unflatten_tensors(item, target) for item in value)
    return value
