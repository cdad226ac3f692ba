"""Sharded checkpoints that a killed process has left complete, but under a temporary name.

A folder cannot replace another one in a single operation. So a sharded checkpoint that is saved again is renamed away before
the new one gets its name. A kill between these two renames leaves two complete folders, and neither has the name.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from camshaft.checkpoints.files import MANIFEST, CheckpointError, sync_folder
from camshaft.checkpoints.names import EARLIEST_TIME, step_of
from camshaft.checkpoints.sharded_load import load_manifest

__all__ = ["REPLACED", "complete_copies", "recover", "temporary_folders"]

REPLACED = ".old"
"""In the name of a temporary folder: it is a checkpoint that is being replaced."""

TEMPORARY = re.compile(r"\.camshaft-(step-[0-9]+)(\.[0-9a-f]{8})?(\.old)?\.tmp")
"""The temporary folders of a save; earlier versions put no random digits into the name."""


def temporary_folders(folder: Path) -> dict[Path, str]:
    """The temporary folders of saves that have a manifest, and the name of the checkpoint that each belongs to."""
    found = {}
    for path in folder.glob(".camshaft-step-*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and step_of(match[1]) is not None and not path.is_symlink() and (path / MANIFEST).is_file():
            found[path] = match[1]
    return found


def complete_copies(folder: Path) -> dict[str, Path]:
    """Finds the complete folders of checkpoints that have only a temporary name. Nothing is changed.

    Args:
        folder: the folder of checkpoints.

    Returns:
        By the name of the checkpoint, the newest complete folder.
    """
    found: dict[str, tuple[tuple[int, bool], Path]] = {}
    for path, name in temporary_folders(folder).items():
        if os.path.lexists(folder / name):
            continue
        with suppress(CheckpointError, OSError, KeyError, TypeError):
            written = int(load_manifest(path)["rotation"]["entry"]["written"])
            age = written if written < EARLIEST_TIME else 0, REPLACED not in path.name
            if name not in found or age > found[name][0]:
                found[name] = age, path
    return {name: path for name, (_, path) in found.items()}


def recover(folder: Path) -> None:
    """Gives the folders that :func:`complete_copies` finds their names. Only the owner of the folder may call it."""
    for name, path in complete_copies(folder).items():
        os.replace(path, folder / name)
        sync_folder(folder)
