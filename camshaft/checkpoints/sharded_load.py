"""Reading a sharded checkpoint: a folder in which every rank has written its own part, by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import MANIFEST, CheckpointError
from camshaft.checkpoints.names import step_of
from camshaft.checkpoints.shard_checks import check_part, check_placeholders, check_slices
from camshaft.checkpoints.shard_table import read_metadata_file
from camshaft.checkpoints.text import printable
from camshaft.distributed.collectives import cpu_group
from camshaft.distributed.dtensors import is_dtensor

__all__ = ["first_failure", "load_manifest", "load_shards", "unflatten_tensors"]

Reference = Callable[[str], "torch.Tensor | None"]


def load_manifest(path: Path) -> dict[str, Any]:
    """Reads everything of a folder except its tensors, if every byte of every file is as written.

    Raises:
        CheckpointError: says what is wrong with the folder.
        FileNotFoundError: if it does not exist.
    """
    if not (path / MANIFEST).exists():
        checkpoints = [item.name for item in path.iterdir() if step_of(item.name) is not None]
        if checkpoints:
            newest = path / max(checkpoints, key=lambda name: step_of(name) or 0)
            raise CheckpointError(
                f"{path} is a folder of checkpoints, and not one of them; give the path of one, such as {newest}, or attach "
                f"CheckpointRotation({str(path)!r}) and call its resume('auto')"
            )
        raise CheckpointError(f"{path} is not a file, and as a folder it is incomplete: {MANIFEST} does not exist")
    if (path / MANIFEST).is_symlink():
        raise CheckpointError(f"{path} is damaged: {MANIFEST} is a symbolic link")
    manifest = load_checked(path / MANIFEST)
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path} is not a checkpoint of a trainer")
    files = manifest.get("files")
    if not isinstance(files, dict) or ".metadata" not in files:
        raise CheckpointError(f"{path} is not a checkpoint of a trainer: its manifest lists no files")
    for name, entry in files.items():
        check_part(path, name, entry)
    metadata = read_metadata_file(path, {name: size for name, (size, _) in files.items()})
    check_slices(path, metadata)
    for key in ("phases", "handlers"):
        check_placeholders(path, manifest.get(key), f"/{key}", metadata)
    return manifest


def load_shards(path: Path, manifest: dict[str, Any], reference: Reference, *, together: bool = True) -> dict[str, Any]:
    """Reads the complete content of a folder. Of a sharded tensor, each process reads only its own part.

    Args:
        path: the folder.
        manifest: the result of :func:`load_manifest`, or the part of it that is needed.
        reference: returns, by the name of a tensor, one that is sharded as it must be here, or ``None`` for a full tensor.
        together: whether every process calls this, if several train; an error of one is then raised on all.

    Raises:
        CheckpointError: if a part cannot be read.
    """
    targets: dict[str, torch.Tensor] = {}

    def target(placeholder: Mapping[str, Any]) -> torch.Tensor:
        name = placeholder["tensor"]
        try:
            like = reference(name)
        except (LookupError, ValueError):  # the trainer has no such tensor, which is found when it is restored
            like = None
        if like is not None and is_dtensor(like) and tuple(like.shape) == tuple(placeholder["shape"]):
            targets[name] = torch.zeros_like(like, dtype=placeholder["dtype"], requires_grad=False)
        else:
            targets[name] = torch.empty(placeholder["shape"], dtype=placeholder["dtype"])
        return targets[name]

    content = {**manifest, **{key: unflatten_tensors(manifest[key], target) for key in ("phases", "handlers")}}
    try:
        if together and dist.is_initialized():
            load(targets, storage_reader=_Reader(path), process_group=cpu_group())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a single process is expected here
                load(targets, storage_reader=_Reader(path), no_dist=True)
    except CheckpointError:
        raise
    except (CheckpointException, Exception) as error:  # DCP's own is a BaseException, and collects what its readers raise
        raise CheckpointError(f"{path} can't be read: {printable(first_failure(error))}") from error
    return content


class _Reader(FileSystemReader):
    """DCP's reader, with a table of contents that has been checked."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata_file(Path(self.path))
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def unflatten_tensors(value: Any, target: Callable[[Mapping[str, Any]], torch.Tensor]) -> Any:
    """The reverse of :func:`flatten_tensors`; ``target`` returns the tensor for a placeholder."""
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
