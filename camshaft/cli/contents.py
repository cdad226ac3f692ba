"""What a checkpoint holds, be it a file or a folder that several processes have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError
from camshaft.checkpoints.names import step_of
from camshaft.checkpoints.sharded_load import load_manifest, load_shards

__all__ = ["checked", "newest_content", "size_of", "without_weights"]


def checked(path: Path) -> Any:
    """Reads a checkpoint, or any other file of ``torch.save``, if every byte is as written.

    Args:
        path: the file, or the folder of a sharded checkpoint.

    Returns:
        Its content; of a folder, what it holds beside its tensors.

    Raises:
        CheckpointError: says what is wrong with it.
    """
    is_ours = step_of(path.name) is not None
    if not path.is_dir():
        content = load_checked(path, sealed=is_ours)
    else:
        try:
            content = load_manifest(path)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of a trainer: its manifest lists no files") from error
    if is_ours and not (isinstance(content, dict) and "phases" in content):
        raise CheckpointError(f"{path} is not a checkpoint of a trainer")
    return content


def without_weights(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A sharded checkpoint's handlers and clocks with their tensors, which are small; its weights stay on the disk.

    Raises:
        CheckpointError: if a part can't be read.
    """
    phases = {
        name: {"optimizer_step": phase["optimizer_step"], "optimizers": [rates_of(each) for each in phase["optimizers"]]}
        for name, phase in manifest["phases"].items()
    }
    return load_shards(path, {**manifest, "phases": phases}, lambda name: None)


def rates_of(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state without what it keeps for each parameter."""
    return {"param_groups": optimizer["param_groups"]}


def newest_content(paths: list[Path]) -> tuple[Mapping[str, Any], list[str]]:
    """What the first good one of some checkpoints holds (nothing if there is none), and what is wrong with those before."""
    warnings: list[str] = []
    for path in paths:
        try:
            content = checked(path)
            if "clocks" in content:
                return without_weights(path, content) if path.is_dir() else content, warnings
            warnings.append(f"{path} is not a checkpoint of a trainer")
        except CheckpointError as error:
            warnings.append(str(error))
    return {}, warnings


def size_of(path: Path) -> int | None:
    """The bytes of a file, or of all files of a folder; ``None`` if it does not exist."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.iterdir())
    return path.stat().st_size if path.is_file() else None
