"""Work on a device that is recorded once as a CUDA graph, and replayed in one launch from then on."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["RECORDERS", "CudaRecorder", "Kind", "Recording", "Recordings"]

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
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays the work, and what it has returned, in tensors that each replay writes to; it doesn't run by this."""
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        present = torch.cuda.current_stream(self.device)  # where recording fails, torch leaves its own stream the current one
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

    def is_due(self, kind: Kind, form: Hashable) -> bool:
        """Counts that work of a form has been met, and says whether it has run often enough as ever."""
        met = self._met.setdefault(kind, {})
        if form not in met:
            if len(met) > MOST_FORMS:
                return False
            if len(met) == MOST_FORMS:
                warnings.warn(
                    f"capture=True: {kind.name} of {self._whose} has come in more than {MOST_FORMS} forms; further ones run "
                    f"without a graph. Forms are told apart by {kind.forms}",
                    stacklevel=2,
                )
        met[form] = met.get(form, 0) + 1
        return met[form] > WARM_UP

    def leave_alone(self, kind: Kind, form: Hashable) -> None:
        """Has work of a form run as ever for good."""
        self._met[kind][form] = NEVER

    def get(self, kind: Kind, form: Hashable) -> Recording | None:
        """The recording of a form, if there is one."""
        return self._made.get((kind, form))

    def record(self, kind: Kind, form: Hashable, work: Callable[[], Any], inputs: list[torch.Tensor]) -> Recording:
        """Records some work, which doesn't run by this.

        Args:
            kind: the kind of work.
            form: its form.
            work: does it.
            inputs: what it reads.

        Raises:
            RuntimeError: where it can't be recorded; says what is in the way.
        """
        before = host_generators()
        try:
            replay, results = self._record_on_device(work)
        except Exception as error:
            first: BaseException = error
            while first.__context__ is not None:  # what has spoilt the recording, before its end failed
                first = first.__context__
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
        self._made[kind, form] = Recording(replay, inputs, results)
        return self._made[kind, form]


def host_generators() -> list[Any]:
    """The states of the random number generators on the host, to be compared."""
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return [random.getstate(), bytes(keys), position, bytes(torch.get_rng_state().numpy())]  # type: ignore[arg-type]
