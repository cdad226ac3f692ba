"""Weights alone, in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError, save_durably
from camshaft.checkpoints.sharded_load import load_manifest, load_shards
from camshaft.distributed.collectives import all_gather_object, is_main_process, on_rank_zero
from camshaft.distributed.dtensors import distribute_like, full_tensor, is_dtensor
from camshaft.models import ddp_wrapper, load_plain_state_dict, plain_state_dict, strip_wrapper_prefixes, unwrap
from camshaft.resume.phase_state import check_same_keys

__all__ = ["load_weights", "save_weights"]


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes a model's weights and buffers, under names without the prefixes of DataParallel, DDP and ``torch.compile``.

    The file replaces an older one atomically, and any ``torch.load(path, weights_only=True)`` reads it.

    Of several processes, call it on every one: of a model in DDP the first alone writes, and nobody waits for it. Where FSDP2
    has split the weights they are brought together for the first one, and all wait until the file is there. A model that
    isn't wrapped is each process's own, and is written by whoever calls.

    Args:
        model: any module.
        path: the file; its folder is made if it does not exist.

    Returns:
        The path.

    Raises:
        OSError: if it can't be written; under FSDP2 on every process.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> path = save_weights(model, tempfile.mkdtemp() + "/linear.pt")
        >>> load_weights(model, path)
    """
    path = Path(path)
    state = plain_state_dict(model)
    if any(is_dtensor(value) for value in state.values()):
        write_together(state, path)
    elif is_main_process() or ddp_wrapper(model) is None:
        write(state, path)
    return path


def write(state: Mapping[str, Any], path: Path) -> None:
    """Writes a state dict durably, and makes its folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_durably(dict(state), path)


def write_together(state: Mapping[str, Any], path: Path) -> None:
    """Has the first process write tensors of which each holds a part.

    Raises:
        OSError: on every process if the first one can't write.
    """
    held: dict[str, Any] = {}
    for name, value in state.items():
        value = full_tensor(value)
        if is_main_process():  # one after the other, so that no device has to hold them all
            held[name] = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    on_rank_zero(lambda: write(held, path))


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads weights into a model, wrapped or not; a trainer's checkpoint will do, too, and gives its first phase's model.

    Every process that has the model must call it; each reads the file. Where FSDP2 has split the weights, each keeps its
    part, and what goes wrong on one is an error on all.

    Args:
        model: the module; its parameters stay on their device.
        path: a file from :func:`save_weights`, ``torch.save(model.state_dict())`` or a checkpoint, be it a file or the
            folder of a sharded one.

    Raises:
        RuntimeError: if the file does not exist, is damaged or holds more than tensors and plain values.
        ValueError: if it is of another model; the text names the keys that differ.

    Example:
        >>> import tempfile
        >>> path = save_weights(nn.Linear(3, 2), tempfile.mkdtemp() + "/linear.pt")
        >>> load_weights(nn.DataParallel(nn.Linear(3, 2)), path)
    """
    own = plain_state_dict(model)
    is_shared = any(is_dtensor(value) for value in own.values())
    saved: dict[str, Any] = {}
    error: Exception | None = None
    try:
        saved = strip_wrapper_prefixes(read(Path(path), own), own)
        check_same_keys(saved, own, f"this {type(unwrap(model)).__name__}", str(path))
    except (OSError, RuntimeError, ValueError) as failure:
        error = failure
    for number, problem in enumerate(all_gather_object(None if error is None else str(error)) if is_shared else ()):
        if error is None and problem is not None:
            error = CheckpointError(f"rank {number} could not load the weights: {problem}")
    if error is not None:
        raise error
    load_plain_state_dict(model, {name: distribute_like(value, own[name]) for name, value in saved.items()})


def read(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a file or of a checkpoint's first phase; of a folder those that are split are read as ``own`` has them.

    Raises:
        CheckpointError: if there are none.
    """
    if path.is_dir():
        return read_folder(path, own)
    content = load_checked(path, sealed=False)
    if isinstance(content, dict) and "phases" in content:
        content = next(iter(content["phases"].values()))["module"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    below = next((name for name, part in content.items() if are_weights(part, own)), None)
    if below is not None and not are_weights(content, own):
        raise CheckpointError(
            f"{path} holds more than a model's weights, which seem to lie under {below!r}; load them by "
            f"model.load_state_dict(torch.load({str(path)!r}, weights_only=True)[{below!r}])"
        )
    if any(is_dtensor(value) and not is_dtensor(own.get(name)) for name, value in content.items()):
        raise CheckpointError(
            f"{path} holds one process's part of a model under fully_shard; call save_weights(model, path) on every rank"
        )
    return content


def are_weights(value: Any, own: Mapping[str, Any]) -> bool:
    """Whether a value is a state dict that knows some of a model's names."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return not own.keys().isdisjoint(strip_wrapper_prefixes(value, own))


def read_folder(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the first phase of a sharded checkpoint."""
    manifest = load_manifest(path)
    name, phase = next(iter(manifest["phases"].items()))
    wanted = {"phases": {name: {"module": phase["module"]}}, "handlers": {}}
    start = f"/phases/{name}/module/"
    content = load_shards(path, wanted, lambda place: own.get(place.removeprefix(start)), together=False)
    found: dict[str, Any] = content["phases"][name]["module"]
    return found
