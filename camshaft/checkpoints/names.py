"""The names of checkpoints, by which a folder's other files are told apart from them."""

from __future__ import annotations

import re

__all__ = ["file_name", "step_of"]

NAME = re.compile(r"step-(\d{8,})(\.pt)?")


def file_name(step: int, sharded: bool = False) -> str:
    """The name of the checkpoint of an optimizer step: a file, or a folder where every process writes its part."""
    return f"step-{step:08d}" + ("" if sharded else ".pt")


def step_of(name: str) -> int | None:
    """The optimizer step in a checkpoint's name; ``None`` for any other file."""
    found = NAME.fullmatch(name)
    return int(found[1]) if found else None
