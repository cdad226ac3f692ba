"""Releases cached device memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch

from camshaft.events import Events, Priority, split
from camshaft.handler import Handler, Listener

__all__ = ["EmptyCache"]


class EmptyCache(Handler):
    """Collects garbage and releases the accelerator's cached memory, by default after each epoch.

    This gives PyTorch no additional memory. It helps if another program shares the device, or if evaluation needs tensors of
    other sizes than training. In every iteration it would slow training down.

    Args:
        every: the event or events on which it runs.

    Raises:
        TypeError: if ``every`` is not an event.

    Example:
        >>> cache = EmptyCache(every=Events.EPOCH_COMPLETED(every=5))
    """

    def __init__(self, every: Any = Events.EPOCH_COMPLETED) -> None:
        self.every = split(every)

    def listeners(self) -> Iterator[Listener]:
        """Yields the events in ``every``."""
        for event in self.every:
            yield Listener(event, self.empty, Priority.LOG)

    def empty(self, engine: Any) -> None:
        """Collects garbage, and releases cached memory if there is an accelerator."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()
