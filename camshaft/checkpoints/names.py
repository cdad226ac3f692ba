"""The names and numbers of checkpoints, which tell them apart from other files and from each other."""

from __future__ import annotations

import re

__all__ = ["EARLIEST_TIME", "file_name", "step_of"]

EARLIEST_TIME = 10**15
"""From here on, ``written`` is not the number of a save but a time in nanoseconds, as earlier versions stored it."""

NAME = re.compile(r"step-([0-9]{8,18})(\.pt)?")


def file_name(step: int, sharded: bool = False) -> str:
    """The name of the checkpoint of an optimizer step: a file, or a folder if it is sharded."""
    return f"step-{step:08d}" + ("" if sharded else ".pt")


def step_of(name: str) -> int | None:
    """The optimizer step in a checkpoint's name; ``None`` for every name that :func:`file_name` does not produce."""
    found = NAME.fullmatch(name)
    if found is None or file_name(int(found[1]), sharded=found[2] is None) != name:
        return None
    return int(found[1])
