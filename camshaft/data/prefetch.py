"""Fetches the next batch and copies it to the device while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch

from camshaft.pytree import tensors, to_device

__all__ = ["Prefetch"]


class Prefetch:
    """A loader that fetches one batch ahead, and copies it to the device while the step computes.

    On a CUDA device the copy has its own stream; it overlaps with the step only from pinned memory
    (``DataLoader(pin_memory=True)``). On other devices batches are fetched ahead and moved too, so that a script need not
    change. Batches keep the loader's order, and a run over a ``Prefetch`` resumes as exactly as one over the loader. It is
    meant for loaders with workers. Without workers, a batch is loaded before the previous step, so that augmentation draws
    other numbers from the global generators than without ``Prefetch``, and saving their state takes about 50 us per batch.

    Args:
        loader: batches that can be iterated over again and again (a ``DataLoader``, a list).
        device: the target device of every tensor of a batch.

    Raises:
        TypeError: if the loader is not iterable, or is a ``Prefetch`` already.
        RuntimeError: if the device does not exist.

    Example:
        >>> loader = torch.utils.data.DataLoader(torch.arange(6.0), batch_size=2)
        >>> [batch.tolist() for batch in Prefetch(loader, "cpu")]
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | str) -> None:
        if isinstance(loader, Prefetch) or not isinstance(loader, Iterable):
            raise TypeError(f"loader must be an iterable of batches, and not a Prefetch already, got a {type(loader).__name__}")
        self.loader, self.device = loader, torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device is {str(device)!r}, but torch finds no CUDA device; pass the device of the model")
        self.before_fetch: Callable[[], Any] = lambda: None
        """Called before each batch is fetched; :attr:`state_before_fetch` is its latest result."""
        self.state_before_fetch: Any = None
        """The result of :attr:`before_fetch` for the batch that has been fetched but not returned yet."""

    def __iter__(self) -> Iterator[Any]:
        self.state_before_fetch = None
        return _Ahead(iter(self.loader), self)

    def __len__(self) -> int:
        if isinstance(self.loader, Sized):
            return len(self.loader)
        raise TypeError(f"a {type(self.loader).__name__} has no length")

    def resume(self, batches: Iterator[Any], fetched: bool) -> Iterator[Any]:
        """Iterates over the rest of a pass that continues in the middle.

        Args:
            batches: the rest of the loader's pass.
            fetched: whether to fetch the first batch now instead of when it is needed.
        """
        self.state_before_fetch = None
        return _Ahead(batches, self, fetched)


class _Ahead:
    """One pass. The end of the data, or an error, shows when its batch is needed, and not one batch too early."""

    def __init__(self, batches: Iterator[Any], prefetch: Prefetch, fetched: bool = False) -> None:
        self.batches, self.prefetch = batches, prefetch
        self.stream = torch.cuda.Stream(prefetch.device) if prefetch.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.batch: Any = None
        self.error: Exception | None = None
        self.has_begun = fetched
        if fetched:
            self._fetch()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.has_begun:
            self.has_begun = True
            self._fetch()
        if self.error is not None:
            self._raise()
        batch = self.batch
        if self.stream is not None:
            self._wait_for_copy(batch, torch.cuda.current_stream(self.prefetch.device))
        self._fetch()
        return batch

    def _fetch(self) -> None:
        self.prefetch.state_before_fetch = self.prefetch.before_fetch()
        try:
            batch = next(self.batches)
            with torch.cuda.stream(self.stream):  # does nothing for None
                self.batch = to_device(batch, self.prefetch.device, non_blocking=True)
        except StopIteration as error:
            self.error = error.with_traceback(None)  # its frames hold this iterator, which would never be freed
        except Exception as error:
            self.error = error

    def _raise(self) -> None:
        """Raises the error of the fetch and drops it: its traceback holds this iterator. The next call fetches again."""
        error, self.error, self.has_begun = self.error, None, False
        try:
            assert error is not None
            raise error
        finally:
            del error

    def _wait_for_copy(self, batch: Any, stream: torch.cuda.Stream) -> None:
        """Makes the step wait for the copy, on the device, and keeps the memory until the step has used it."""
        stream.wait_stream(self.stream)  # type: ignore[arg-type]
        for tensor in tensors(batch):
            if tensor.is_cuda:
                tensor.record_stream(stream)
