"""The states of the random number generators that training uses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = [
    "RawStates",
    "generator_state",
    "preserve_rng_state",
    "raw_rng_state",
    "reseed",
    "restore_rng",
    "rng_state",
    "to_numpy_state",
]


def reseed(seed: int) -> None:
    """Seeds the generators of Python, NumPy, torch and each CUDA device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RawStates(NamedTuple):
    """The states of the global generators in their native form, which is fast to get."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: torch.Tensor
    cuda: list[torch.Tensor]

    def plain(self) -> dict[str, Any]:
        """The states as tensors and plain values, for a checkpoint."""
        version, internal, gauss = self.python
        _, keys, position, has_gauss, cached = self.numpy
        state: dict[str, Any] = {
            "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
            "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
            "torch": self.torch,
        }
        return state | ({"cuda": self.cuda} if self.cuda else {})


def raw_rng_state() -> RawStates:
    """The states of the global generators of Python, NumPy, torch and each CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if _cuda_is_used() else []
    numpy: Any = np.random.get_state(legacy=True)
    return RawStates(random.getstate(), numpy, torch.get_rng_state(), cuda)


def rng_state() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy, torch and each CUDA device, as tensors and plain values."""
    return raw_rng_state().plain()


def restore_rng(state: Mapping[str, Any]) -> None:
    """Restores what :func:`rng_state` returned; states of CUDA devices that do not exist here are ignored."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, cuda in zip(range(torch.cuda.device_count()), state.get("cuda", ()), strict=False):
            torch.cuda.set_rng_state(cuda.cpu(), device)


def _cuda_is_used() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restores the global generators after the block."""
    before = raw_rng_state()
    try:
        yield
    finally:
        random.setstate(before.python)
        np.random.set_state(before.numpy)
        torch.set_rng_state(before.torch)
        for device, state in enumerate(before.cuda):
            torch.cuda.set_rng_state(state, device)


def generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, internal, gauss = generator.getstate()
        return [version, list(internal), gauss]
    if isinstance(generator, np.random.RandomState):
        return to_plain_state(generator.get_state(legacy=False))
    return to_plain_state(generator.bit_generator.state)


def to_plain_state(state: Any) -> Any:
    """NumPy's state with its arrays as tensors and its numbers as Python's."""
    if isinstance(state, dict):
        return {key: to_plain_state(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"values": [int(value) for value in state.tolist()], "dtype": str(state.dtype)}
    return state.item() if isinstance(state, np.generic) else state


def to_numpy_state(state: Any) -> Any:
    if isinstance(state, Mapping) and set(state) == {"values", "dtype"}:
        return np.array(state["values"], dtype=state["dtype"])
    return {key: to_numpy_state(value) for key, value in state.items()} if isinstance(state, Mapping) else state
