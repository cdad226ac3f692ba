"""Work on a device that is recorded once as a CUDA graph, and replayed in one launch from then on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from camshaft.rng import raw_rng_state

__all__ = ["CudaRecorder", "Kind", "RECORDERS", "Recording", "Recordings"]

WARM_UP = 3
"""How often work of one form runs as ever before it is recorded, while libraries choose kernels and optimizers make states."""

MOST_FORMS = 16
"""In how many forms a kind of work is met before further ones are left alone: so much variety isn't static."""

NEVER = float("-inf")
"""The count of work that is never recorded."""


class CudaRecorder:
    """Records what functions do on a CUDA device; all its recordings share one pool of memory.

    Threads that load data go on meanwhile: only what this thread does can spoil a recording.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays the work, and what it has returned, in tensors that each replay writes to; it doesn't run by this."""
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        present = torch.cuda.current_stream(self.device)  # where recording fails, torch leaves the other stream the current one
        with torch.cuda.device(self.device), torch.cuda.stream(present), recording:
            results = work()
        return graph.replay, results


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaRecorder}
"""What records, by the type of device."""


class Kind(NamedTuple):
    """A kind of work that is recorded by itself."""

    name: str
    forms: str
    """What its forms are told apart by, and how to have few of them."""


class Recording(NamedTuple):
    """Work that can be replayed."""

    replay: Callable[[], None]
    inputs: list[torch.Tensor]
    """What the work reads, to be filled before a replay."""
    results: Any
    """What the work has returned, written anew by each replay."""
    held: list[torch.Tensor]
    """What else it reads or writes, so that its memory outlasts the recording."""


class Recordings:
    """Recorded work by its kind and form; which is recorded when it has run as ever :data:`WARM_UP` times.

    Args:
        recorder: records on the device.
        whose: whose work it is, for messages.
    """

    def __init__(self, recorder: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]], whose: str) -> None:
        self._record_on_device, self._whose = recorder, whose
        self._met: dict[Kind, dict[Hashable, float]] = {}
        self._made: dict[tuple[Kind, Hashable], Recording] = {}
        self._varied: set[Kind] = set()

    def is_due(self, kind: Kind, form: Hashable) -> bool:
        """Counts that work of a form has been met, and says whether it has run often enough as ever."""
        met = self._met.setdefault(kind, {})
        if form not in met and len(met) == MOST_FORMS:
            self._warn_of_forms(kind)
            for other in [other for other in met if (kind, other) not in self._made]:
                del met[other]  # it has come too seldom to be recorded
            if len(met) == MOST_FORMS:
                return False
        met[form] = met.get(form, 0) + 1
        return met[form] > WARM_UP

    def _warn_of_forms(self, kind: Kind) -> None:
        if kind not in self._varied:
            self._varied.add(kind)
            warnings.warn(
                f"capture=True: {kind.name} of {self._whose} has come in more than {MOST_FORMS} forms; those that come too "
                f"seldom run without a graph. Forms are told apart by {kind.forms}",
                stacklevel=2,
            )

    def is_next(self, kind: Kind, form: Hashable) -> bool:
        """Whether work of a form has run for the last time before it is due."""
        return self._met.get(kind, {}).get(form) == WARM_UP

    def leave_alone(self, kind: Kind, form: Hashable) -> None:
        """Throws a recording away, and has work of its form run as ever."""
        del self._made[kind, form]
        self._met[kind][form] = NEVER

    def get(self, kind: Kind, form: Hashable) -> Recording | None:
        """The recording of a form, if there is one."""
        return self._made.get((kind, form))

    def record(
        self,
        kind: Kind,
        form: Hashable,
        work: Callable[[], Any],
        inputs: list[torch.Tensor],
        held: list[torch.Tensor],
    ) -> Recording:
        """Records some work, which doesn't run by this.

        Args:
            kind: the kind of work.
            form: its form.
            work: does it.
            inputs: what it reads that is filled before each replay.
            held: what else it reads or writes.

        Raises:
            RuntimeError: where it can't be recorded; says what is in the way.
        """
        before, outside = host_generators(), sys.exc_info()[1]
        try:
            replay, results = self._record_on_device(work)
        except Exception as error:
            first: BaseException = error
            while first.__context__ not in (None, outside):  # what has spoilt the recording, before its end failed
                first = first.__context__
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise RuntimeError(
                f"capture=True: {kind.name} of {self._whose} can't be recorded as a CUDA graph: {first}\nNothing in it may "
                "wait for the device or read its values (.item(), print, a boolean mask, torch.tensor(...) of numbers); the "
                "first error above names the line. Or leave capture out"
            ) from error
        if host_generators() != before:
            raise RuntimeError(
                f"capture=True: {kind.name} of {self._whose} draws random numbers on the host, which a graph would "
                "repeat for ever; draw them on the device, or in the data loader"
            )
        self._made[kind, form] = Recording(replay, inputs, results, held)
        return self._made[kind, form]


def host_generators() -> list[Any]:
    """The states of the random number generators on the host, to be compared."""
    states = raw_rng_state()
    _, keys, position, *_ = states.numpy
    return [states.python, bytes(keys), position, bytes(states.torch.numpy())]
