"""Writing a sharded checkpoint: a folder in which every rank writes its own part, by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from camshaft.checkpoints.files import MANIFEST, checksum, delete, save_durably, sync_folder, temporary_name
from camshaft.checkpoints.recovery import REPLACED
from camshaft.checkpoints.sharded_load import first_failure
from camshaft.distributed.collectives import all_gather_object, cpu_group, is_main_process, on_rank_zero, rank
from camshaft.distributed.dtensors import is_dtensor

__all__ = ["flatten_tensors", "save_shards"]


def save_shards(content: Mapping[str, Any], path: Path, last_entries: Callable[[], Mapping[str, Any]] = dict) -> None:
    """Writes a checkpoint as a folder. Every rank must call it, and each writes its own part.

    The order is that of a file: a temporary folder in the same folder, each file flushed to the disk, the manifest last, a
    rename. A complete folder exists at every moment; between two renames it may have a temporary name, which
    :mod:`camshaft.checkpoints.recovery` finds.

    Args:
        content: tensors, sharded or not, and plain values. Those that are not sharded are written as rank 0 has them.
        path: the folder; an existing one is replaced.
        last_entries: called on rank 0 when every part is written; gives further entries of the manifest.

    Raises:
        OSError: on every rank if any of them could not write.
    """
    tensors: dict[str, torch.Tensor] = {}
    rest = flatten_tensors({key: content[key] for key in ("phases", "handlers")}, "", tensors)
    if not is_main_process():  # DCP would take a BatchNorm's statistics from the rank that has the least to write
        tensors = {name: tensor for name, tensor in tensors.items() if is_dtensor(tensor)}
    temporary = on_rank_zero(lambda: _new_folder(path))
    try:
        _write_parts(tensors, temporary)
        files = _checksums(temporary)
        on_rank_zero(lambda: _publish(temporary, path, {**content, **rest, "files": files, **last_entries()}))
    except BaseException:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


class _Writer(FileSystemWriter):
    """DCP's writer, without the folder's path in its metadata: the folder will be renamed, and may be moved."""

    def storage_meta(self) -> None:
        return None


def _new_folder(path: Path) -> Path:
    temporary = path.parent / temporary_name(path.name)
    temporary.mkdir()
    return temporary


def _write_parts(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes this rank's tensors; an error of one rank is an ``OSError`` on all."""
    writer = _Writer(folder, sync_files=True)
    try:
        if dist.is_initialized():
            save(tensors, storage_writer=writer, process_group=cpu_group())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one process is what we have
                save(tensors, storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        raise OSError(f"the parts of a sharded checkpoint could not be written: {first_failure(error)}") from error


def _publish(temporary: Path, path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, which makes the temporary folder complete, and gives it its name."""
    save_durably(manifest, temporary / MANIFEST)
    sync_folder(path.parent)
    if not os.path.lexists(path):
        os.replace(temporary, path)
        return sync_folder(path.parent)
    replaced = path.parent / temporary_name(path.name, REPLACED)
    os.replace(path, replaced)
    try:
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # recovery finds it
            os.replace(replaced, path)
        raise
    sync_folder(path.parent)
    with suppress(OSError):  # the next owner of the folder tries again
        delete(replaced)
    return None


def _checksums(folder: Path) -> dict[str, list[int]]:
    """The size and the CRC-32 of each file, computed by the rank that wrote it; an error of one rank is raised on all."""
    own: dict[str, list[int]] = {}
    problem = None
    try:
        for path in folder.iterdir():
            if path.name.startswith(f"__{rank()}_") or (is_main_process() and path.name == ".metadata"):
                own[path.name] = [path.stat().st_size, checksum(path)]
    except OSError as error:  # the other ranks wait for the result
        problem = f"rank {rank()} could not read what it has written: {error}"
    parts = all_gather_object((own, problem)) if dist.is_initialized() else [(own, problem)]
    problems = [text for _, text in parts if text is not None]
    if problems:
        raise OSError(problems[0])
    return {name: value for part, _ in parts for name, value in part.items()}


def flatten_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A copy of ``value`` with a placeholder for each tensor. The tensor goes to ``tensors``, under its path in ``value``."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {"tensor": name, "shape": list(value.shape), "dtype": value.dtype}
    if isinstance(value, Mapping):
        return {key: flatten_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(flatten_tensors(item, f"{name}/{number}", tensors) for number, item in enumerate(value))
    return value
