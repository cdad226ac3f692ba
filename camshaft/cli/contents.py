"""The content of a checkpoint, which is a file, or a folder that several processes have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError
from camshaft.checkpoints.names import step_of
from camshaft.checkpoints.schema import check_content
from camshaft.checkpoints.sharded_load import load_manifest, load_shards, unflatten_tensors

__all__ = ["checked", "newest_content", "size_of", "without_weights"]


def checked(path: Path) -> Any:
    """Reads a checkpoint, or any other file of ``torch.save``, if every byte is as written.

    Args:
        path: the file, or the folder of a sharded checkpoint.

    Returns:
        Its content; of a folder, everything except its tensors.

    Raises:
        CheckpointError: says what is wrong with it.
    """
    is_ours = step_of(path.name) is not None
    if path.is_dir():
        content = load_manifest(path)
        parts = {key: unflatten_tensors(content.get(key), without_values) for key in ("phases", "handlers")}
        check_content({**content, **parts}, path)
        return content
    content = load_checked(path, sealed=is_ours)
    if is_ours:
        check_content(content, path)
    return content


def without_values(placeholder: Mapping[str, Any]) -> torch.Tensor:
    """A tensor that has a shape and a dtype, but takes no memory."""
    return torch.empty(placeholder["shape"], dtype=placeholder["dtype"], device="meta")


def without_weights(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Reads the handlers and clocks of a sharded checkpoint with their tensors, which are small; its weights are not read.

    Raises:
        CheckpointError: if a part can't be read.
    """
    phases = {
        name: {"optimizer_step": phase["optimizer_step"], "optimizers": [rates_of(each) for each in phase["optimizers"]]}
        for name, phase in manifest["phases"].items()
    }
    return load_shards(path, {**manifest, "phases": phases}, lambda name: None)


def rates_of(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer without the entries of each parameter."""
    return {"param_groups": optimizer["param_groups"]}


def newest_content(paths: list[Path]) -> tuple[Path | None, Mapping[str, Any], list[str]]:
    """The first good checkpoint, its content (empty if there is none), and what is wrong with those before it."""
    warnings: list[str] = []
    for path in paths:
        try:
            content = checked(path)
            if "clocks" in content:
                return path, without_weights(path, content) if path.is_dir() else content, warnings
            warnings.append(f"{path} is not a checkpoint of a trainer")
        except FileNotFoundError:
            warnings.append(f"{path} does not exist")
        except (CheckpointError, OSError) as error:
            warnings.append(str(error))
    return None, {}, warnings


def size_of(path: Path) -> int | None:
    """The bytes of a file, or of all files of a folder; ``None`` if it does not exist."""
    try:
        if path.is_dir():
            return sum(part.stat().st_size for part in path.iterdir())
        return path.stat().st_size if path.is_file() else None
    except OSError:  # it was deleted in the meantime
        return None
