"""The next batch on its way to the device while the present one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch

from camshaft.pytree import tensors, to_device

__all__ = ["Prefetch"]


class Prefetch:
    """A loader that is one batch ahead of whoever asks, and moves that batch to the device beside the computation.

    On a CUDA device the copy has a stream of its own; it runs beside the step only from pinned memory
    (``DataLoader(pin_memory=True)``). Elsewhere batches are fetched ahead and moved all the same, so that a script
    stays as it is. Batches come in the loader's order, and a run over a ``Prefetch`` resumes as exactly as one over the
    loader. It is made for loaders with workers. Without them, a batch is loaded before the step of the batch before it, so that
    augmentation draws other numbers from the global generators than without ``Prefetch``, and their state is noted before
    each batch, which takes some 50 us.

    Args:
        loader: batches that can be passed over again and again (a ``DataLoader``, a list).
        device: where to; every tensor of a batch goes there.

    Raises:
        TypeError: if the loader is none, or is a ``Prefetch`` already.
        RuntimeError: if there is no such device.

    Example:
        >>> loader = torch.utils.data.DataLoader(torch.arange(6.0), batch_size=2)
        >>> [batch.tolist() for batch in Prefetch(loader, "cpu")]
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | str) -> None:
        if isinstance(loader, Prefetch) or not isinstance(loader, Iterable):
            raise TypeError(f"loader must be an iterable of batches that isn't prefetched yet, got a {type(loader).__name__}")
        self.loader, self.device = loader, torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device is {str(device)!r}, and torch finds no CUDA device; give the one that the model is on")
        self.look: Callable[[], Any] = lambda: None
        """Called just before each batch is fetched; what it returned before the last one is :attr:`ahead`."""
        self.ahead: Any = None
        """What :attr:`look` returned before the fetch of the batch that hasn't been handed over yet."""

    def __iter__(self) -> Iterator[Any]:
        self.ahead = None
        return _Ahead(iter(self.loader), self)

    def __len__(self) -> int:
        if isinstance(self.loader, Sized):
            return len(self.loader)
        raise TypeError(f"a {type(self.loader).__name__} has no length")

    def entered(self, batches: Iterator[Any], fetched: bool) -> Iterator[Any]:
        """A pass that continues in the middle of the loader.

        Args:
            batches: what is left of the loader's pass.
            fetched: whether its first batch is to be fetched now, and not when it is asked for.
        """
        self.ahead = None
        return _Ahead(batches, self, fetched)


class _Ahead:
    """One pass. Whatever ends it, or goes wrong in it, shows when that batch is asked for, and not one batch too early."""

    def __init__(self, batches: Iterator[Any], prefetch: Prefetch, fetched: bool = False) -> None:
        self.batches, self.prefetch = batches, prefetch
        self.stream = torch.cuda.Stream(prefetch.device) if prefetch.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.batch: Any = None
        self.error: Exception | None = None
        self.began = fetched
        if fetched:
            self._fetch()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.began:
            self.began = True
            self._fetch()
        if self.error is not None:
            raise self.error
        batch = self.batch
        if self.stream is not None:
            self._take_over(batch, torch.cuda.current_stream(self.prefetch.device))
        self._fetch()
        return batch

    def _fetch(self) -> None:
        self.prefetch.ahead = self.prefetch.look()
        try:
            batch = next(self.batches)
            with torch.cuda.stream(self.stream):  # does nothing for None
                self.batch = to_device(batch, self.prefetch.device, non_blocking=True)
        except Exception as error:
            self.error = error

    def _take_over(self, batch: Any, stream: torch.cuda.Stream) -> None:
        """Has the step wait, on the device, for the copy, and keeps the memory until the step is done with it."""
        stream.wait_stream(self.stream)  # type: ignore[arg-type]
        for tensor in tensors(batch):
            if tensor.is_cuda:
                tensor.record_stream(stream)
