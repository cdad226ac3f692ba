"""CUDA graphs of work on a device: captured once, then replayed in one launch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from camshaft.rng import raw_rng_state

__all__ = ["CAPTURERS", "CapturedGraph", "CudaCapturer", "GraphCache", "Kind"]

WARMUPS = 3
"""The number of eager runs before a capture, in which libraries choose kernels and optimizers create their states."""

MAX_SIGNATURES = 16
"""The number of signatures of one kind of work that are captured; any further ones run eagerly."""

DISABLED = float("-inf")
"""The count of work that is never captured."""


class CudaCapturer:
    """Captures the work of functions on a CUDA device; all its graphs share one memory pool.

    Threads that load data may continue meanwhile: only this thread can invalidate a capture.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Captures the work without running it. Returns its replay, and its results in tensors that each replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        present = torch.cuda.current_stream(self.device)  # if the capture fails, torch does not restore the current stream
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(present), capture:
                results = work()
        except BaseException:
            self._end_capture_of_generator()
            raise
        return graph.replay, results

    def _end_capture_of_generator(self) -> None:
        """Lets the device's random generator draw again: after a failed capture it would raise until the process ends."""
        generator = torch.cuda.default_generators[self.device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())


CAPTURERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaCapturer}
"""The capturer for each type of device."""


class Kind(NamedTuple):
    """A kind of work that has graphs of its own."""

    name: str
    signature: str
    """What distinguishes its signatures, and how to have few of them."""


class CapturedGraph(NamedTuple):
    """Work that can be replayed."""

    replay: Callable[[], None]
    inputs: list[torch.Tensor]
    """The input tensors, to be filled before each replay."""
    results: Any
    """What the work returned; each replay overwrites it."""
    held: list[torch.Tensor]
    """The other tensors that it reads or writes, kept alive as long as the graph."""


class GraphCache:
    """The captured graphs by kind of work and input signature. Work is captured after :data:`WARMUPS` eager runs.

    Args:
        capturer: captures work on the device.
        owner: whose work it is, for messages.
    """

    def __init__(self, capturer: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]], owner: str) -> None:
        self._capture_on_device, self._owner = capturer, owner
        self._runs: dict[Kind, dict[Hashable, float]] = {}
        self._graphs: dict[tuple[Kind, Hashable], CapturedGraph] = {}
        self._warned: set[Kind] = set()

    def should_capture(self, kind: Kind, key: Hashable) -> bool:
        """Counts a run of some work, and returns whether its eager runs are over.

        Args:
            kind: the kind of work.
            key: its input signature.
        """
        runs = self._runs.setdefault(kind, {})
        if key not in runs and len(runs) == MAX_SIGNATURES:
            self._warn_of_signatures(kind)
            for other in [other for other in runs if (kind, other) not in self._graphs]:
                del runs[other]  # too rare to be captured
            if len(runs) == MAX_SIGNATURES:
                return False
        runs[key] = runs.get(key, 0) + 1
        return runs[key] > WARMUPS

    def _warn_of_signatures(self, kind: Kind) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(
                f"capture=True: {kind.name} of {self._owner} has more than {MAX_SIGNATURES} input signatures; the rare ones "
                f"run without a graph. Signatures differ by {kind.signature}",
                stacklevel=2,
            )

    def is_last_warmup(self, kind: Kind, key: Hashable) -> bool:
        """Whether the last counted run was the last eager one before the capture."""
        return self._runs.get(kind, {}).get(key) == WARMUPS

    def disable(self, kind: Kind, key: Hashable) -> None:
        """Discards a graph, and makes its work run eagerly from now on."""
        del self._graphs[kind, key]
        self._runs[kind][key] = DISABLED

    def get(self, kind: Kind, key: Hashable) -> CapturedGraph | None:
        """The graph for a signature, if it has been captured."""
        return self._graphs.get((kind, key))

    def capture(
        self,
        kind: Kind,
        key: Hashable,
        work: Callable[[], Any],
        inputs: list[torch.Tensor],
        held: list[torch.Tensor],
    ) -> CapturedGraph:
        """Captures some work, without running it.

        Args:
            kind: the kind of work.
            key: its input signature.
            work: does it.
            inputs: the input tensors that are filled before each replay.
            held: the other tensors that it reads or writes.

        Raises:
            RuntimeError: if it can't be captured; says why.
        """
        generators, outer = host_generators(), sys.exc_info()[1]
        try:
            replay, results = self._capture_on_device(work)
        except Exception as error:
            cause = first_cause(error, outer)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise RuntimeError(
                f"capture=True: {kind.name} of {self._owner} can't be captured as a CUDA graph: {cause}\nNothing in it may "
                "wait for the device or read its values (.item(), print, a boolean mask, torch.tensor(...) of numbers); the "
                "first error above names the line. Or leave capture out"
            ) from error
        if host_generators() != generators:
            raise RuntimeError(
                f"capture=True: {kind.name} of {self._owner} draws random numbers on the host, which a graph would "
                "repeat forever; draw them on the device, or in the data loader"
            )
        self._graphs[kind, key] = CapturedGraph(replay, inputs, results, held)
        return self._graphs[kind, key]


def first_cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """The first exception of a chain: the one that has invalidated the capture, before ending it failed too."""
    while error.__context__ not in (None, outer):
        error = error.__context__
    return error


def host_generators() -> list[Any]:
    """The states of the host's random number generators, for comparison."""
    states = raw_rng_state()
    _, keys, position, *_ = states.numpy
    return [states.python, bytes(keys), position, bytes(states.torch.numpy())]
