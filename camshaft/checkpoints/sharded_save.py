"""Writing a sharded checkpoint: a folder in which every rank writes its own part, by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from camshaft.checkpoints.files import MANIFEST, TEMP_PREFIX, checksum, save_durably, sync_folder
from camshaft.checkpoints.sharded_load import first_failure
from camshaft.distributed.collectives import all_gather_object, broadcast_object, host_group, is_main_process, rank
from camshaft.distributed.dtensors import is_dtensor

__all__ = ["flatten_tensors", "save_shards"]


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
            raise OSError(f"the parts of {path} could not be written: {first_failure(error)}") from error
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
