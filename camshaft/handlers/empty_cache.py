"""Hands cached device memory back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch

from camshaft.events import Events, Priority, split
from camshaft.handler import Handler, Listener

__all__ = ["EmptyCache"]


class EmptyCache(Handler):
    """Collects garbage and hands the accelerator's cached memory back, by default after each epoch.

    It makes no memory that PyTorch needs; it helps where another program shares the device, or where evaluation needs other
    sizes than training. Once per iteration it would slow training down.

    Args:
        every: the event, or events, at which to do it.

    Raises:
        TypeError: if ``every`` is no event.

    Example:
        >>> cache = EmptyCache(every=Events.EPOCH_COMPLETED(every=5))
    """

    def __init__(self, every: Any = Events.EPOCH_COMPLETED) -> None:
        self.every = split(every)

    def listeners(self) -> Iterator[Listener]:
        """The events asked for."""
        for event in self.every:
            yield Listener(event, self.empty, Priority.LOG)

    def empty(self, engine: Any) -> None:
        """Collects and hands back; without an accelerator only the garbage is collected."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()
