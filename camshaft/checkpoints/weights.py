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
from camshaft.checkpoints.text import printable
from camshaft.distributed.collectives import all_gather_object, is_main_process, on_rank_zero
from camshaft.distributed.dtensors import distribute_like, full_tensor, is_dtensor
from camshaft.models import ddp_wrapper, load_plain_state_dict, plain_state_dict, strip_wrapper_prefixes, unwrap
from camshaft.resume.phase_state import check_same_keys

__all__ = ["load_weights", "save_weights"]


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes a model's weights and buffers, under names without the prefixes of DataParallel, DDP and ``torch.compile``.

    The file replaces an older one atomically, and any ``torch.load(path, weights_only=True)`` reads it.

    With several processes, call it on every rank. For a model in DDP only rank 0 writes, and the others do not wait. If FSDP2
    has sharded the weights, they are gathered on rank 0, and all ranks wait until the file is complete. A model that is not
    wrapped belongs to its process, and every process that calls this writes it.

    Args:
        model: any module.
        path: the file; its folder is made if it does not exist.

    Returns:
        The path.

    Raises:
        OSError: if it cannot be written; under FSDP2 on every rank.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> path = save_weights(model, tempfile.mkdtemp() + "/linear.pt")
        >>> load_weights(model, path)
    """
    path = Path(path)
    state = plain_state_dict(model)
    if any(is_dtensor(value) for value in state.values()):
        save_sharded(state, path)
    elif is_main_process() or ddp_wrapper(model) is None:
        write(state, path)
    return path


def write(state: Mapping[str, Any], path: Path) -> None:
    """Writes a state dict durably, and makes its folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_durably(dict(state), path)


def save_sharded(state: Mapping[str, Any], path: Path) -> None:
    """Writes sharded tensors on rank 0. Every rank must call it.

    Raises:
        OSError: on every rank if rank 0 cannot write.
    """
    held: dict[str, Any] = {}
    for name, value in state.items():
        value = full_tensor(value)
        if is_main_process():  # one at a time, so that no device has to hold all of them
            held[name] = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    on_rank_zero(lambda: write(held, path))


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads weights into a model, wrapped or not. From a trainer's checkpoint, the model of its first phase is loaded.

    Every process that has the model must call it, and reads the file. If FSDP2 has sharded the weights, each rank keeps its
    part, and an error of one rank is raised on all.

    Args:
        model: the module; its parameters stay on their device.
        path: a file from :func:`save_weights` or ``torch.save(model.state_dict())``, or a checkpoint: a file, or the folder of
            a sharded one.

    Raises:
        CheckpointError: if the file is damaged, or holds more than tensors and plain values.
        FileNotFoundError: if it does not exist.
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
        check_kinds(Path(path), saved, own)
    except (OSError, RuntimeError, ValueError) as failure:
        error = failure
    for number, problem in enumerate(all_gather_object(None if error is None else str(error)) if is_shared else ()):
        if error is None and problem is not None:
            error = CheckpointError(f"rank {number} could not load the weights: {problem}")
    if error is not None:
        raise error
    load_plain_state_dict(model, {name: distribute_like(value, own[name]) for name, value in saved.items()})


def check_kinds(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ``CheckpointError`` if an entry is not a tensor although the model has one there, or one of another layout."""
    for name, value in own.items():
        if isinstance(value, torch.Tensor) and getattr(saved[name], "layout", None) != value.layout:
            raise CheckpointError(f"{path}: {name} must be a {value.layout} tensor, got a {type(saved[name]).__name__}")


def read(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a file, or of the first phase of a checkpoint; of a folder, tensors are sharded as in ``own``.

    Raises:
        CheckpointError: if there are none.
    """
    if path.is_dir():
        return read_folder(path, own)
    content = load_checked(path, sealed=False)
    if isinstance(content, dict) and "phases" in content:
        content = first_phase(path, content)[1]["module"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    strange = next((name for name in content if not isinstance(name, str) or not name.isprintable()), None)
    if strange is not None:
        raise CheckpointError(f"{path} has an entry {printable(repr(strange), 100)}, which is no name of a parameter")
    below = next((name for name, part in content.items() if are_weights(part, own)), None)
    if below is not None and not are_weights(content, own):
        raise CheckpointError(
            f"{path} holds more than a model's weights, which seem to be under {below!r}; load them by "
            f"model.load_state_dict(torch.load({str(path)!r}, weights_only=True)[{below!r}])"
        )
    if any(is_dtensor(value) and not is_dtensor(own.get(name)) for name, value in content.items()):
        raise CheckpointError(
            f"{path} holds one process's part of a model under fully_shard; call save_weights(model, path) on every rank"
        )
    return content


def first_phase(path: Path, content: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name and the state of the first phase of a checkpoint.

    Raises:
        CheckpointError: if it has none with a model.
    """
    phases = content.get("phases")
    found = next(iter(phases.items()), None) if isinstance(phases, dict) else None
    if found is None or not isinstance(found[1], dict) or not isinstance(found[1].get("module"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of a trainer: its first phase has no model")
    return found


def are_weights(value: Any, own: Mapping[str, Any]) -> bool:
    """Whether a value is a state dict with some of a model's names."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return not own.keys().isdisjoint(strip_wrapper_prefixes(value, own))


def read_folder(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the first phase of a sharded checkpoint."""
    manifest = load_manifest(path)
    name, phase = first_phase(path, manifest)
    wanted = {"phases": {name: {"module": phase["module"]}}, "handlers": {}}
    start = f"/phases/{name}/module/"
    content = load_shards(path, wanted, lambda tensor: own.get(tensor.removeprefix(start)), together=False)
    found: dict[str, Any] = content["phases"][name]["module"]
    if not all(isinstance(key, str) and key.isprintable() for key in found):
        raise CheckpointError(f"{path} has an entry which is no name of a parameter")
    return found
