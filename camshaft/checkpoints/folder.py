"""Taking a folder for the checkpoints of one run: it is made, locked, and cleared of what a killed run has left there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from camshaft.checkpoints.files import TEMP_PREFIX, check_name_lengths, remove_temporary_files, sync_folder
from camshaft.checkpoints.lock import FolderInUseError, FolderLock
from camshaft.checkpoints.recovery import recover
from camshaft.distributed.collectives import is_main_process, world_size

__all__ = ["rank_zero_first", "take_folder"]

_calls = itertools.count()


def take_folder(lock: FolderLock, owner: Any) -> None:
    """Makes the folder of a lock, takes it for a trainer, and repairs it. Nothing is changed if another run has it.

    Args:
        lock: the lock of the folder.
        owner: the trainer.

    Raises:
        FolderInUseError: if another run writes its checkpoints there.
        OSError: if the folder cannot be written.
    """
    folder = lock.folder
    try:
        check_name_lengths(folder)
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        lock.acquire(owner)
        probe = folder / f"{TEMP_PREFIX}{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        is_blocked = isinstance(error, (FileExistsError, NotADirectoryError))
        file = next((parent for parent in (folder, *folder.parents) if is_blocked and parent.is_file()), None)
        reason = error.strerror or str(error) if file is None else f"{file} is a file, not a folder"
        raise type(error)(error.errno, f"dirname: checkpoints can't be written there ({reason})", str(folder)) from error
    recover(folder)
    remove_temporary_files(folder)


def rank_zero_first(action: Callable[[], None]) -> None:
    """Runs an action on rank 0, which waits for nobody. The other ranks wait for its end, and raise its error.

    So rank 0 goes on even if it is the only one that calls this, as in ``if rank == 0: handler.attach(trainer)``, and the check
    at the start of the run can say what is wrong.

    Raises:
        Exception: as the action raises it.
    """
    get_store = getattr(dist.distributed_c10d, "_get_default_store", None) if world_size() > 1 else None
    if get_store is None:
        return action() if is_main_process() else None
    store, key = get_store(), f"camshaft/first/{next(_calls)}"
    if not is_main_process():
        text = store.get(key).decode()
        if text:
            kind, _, message = text.partition(":")
            raise {"OSError": OSError, "FolderInUseError": FolderInUseError}.get(kind, RuntimeError)(f"rank 0: {message}")
        return None
    try:
        action()
    except BaseException as error:
        store.set(key, f"{'OSError' if isinstance(error, OSError) else type(error).__name__}:{error or type(error).__name__}")
        raise
    store.set(key, "")
    return None
