"""The states of the random number generators that training uses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = [
    "GENERATORS",
    "RawStates",
    "encode_generator",
    "preserve_rng_state",
    "raw_rng_state",
    "reseed",
    "restore_generator",
    "restore_rng",
    "rng_state",
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
    random.setstate(decode_python(state["python"]))
    np.random.set_state(decode_numpy(state["numpy"]))
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


GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
"""The kinds of random generators that a data loader may have of its own."""


def encode_generator(generator: Any) -> Any:
    """The state of one of the :data:`GENERATORS` as a tensor or plain values, for a checkpoint."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, internal, gauss = generator.getstate()
        return [version, list(internal), gauss]
    if isinstance(generator, np.random.RandomState):
        return encode_numpy(generator.get_state(legacy=False))
    return encode_numpy(generator.bit_generator.state)


def restore_generator(generator: Any, state: Any) -> None:
    """Restores what :func:`encode_generator` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate(decode_python(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(decode_numpy(state))
    else:
        generator.bit_generator.state = decode_numpy(state)


def decode_python(state: Any) -> tuple[Any, ...]:
    """The state of Python's generator as ``random.setstate`` takes it, from a tensor or a list of its words."""
    version, words, gauss = state
    return version, tuple(words.tolist() if isinstance(words, torch.Tensor) else words), gauss


def encode_numpy(state: Any) -> Any:
    """The state of a NumPy generator with its arrays and numbers as plain values."""
    if isinstance(state, dict):
        return {key: encode_numpy(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"values": [int(value) for value in state.tolist()], "dtype": str(state.dtype)}
    return state.item() if isinstance(state, np.generic) else state


def decode_numpy(state: Any) -> Any:
    """The state of a NumPy generator as NumPy takes it: from :func:`encode_numpy`, or from the list of :class:`RawStates`."""
    if isinstance(state, list):
        keys, position, has_gauss, cached = state
        return "MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached
    if isinstance(state, Mapping) and set(state) == {"values", "dtype"}:
        return np.array(state["values"], dtype=state["dtype"])
    return {key: decode_numpy(value) for key, value in state.items()} if isinstance(state, Mapping) else state
