"""Numbers on their way from the device to the host, which nobody has to wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Readback"]

ASYNCHRONOUS = ("cuda", "xpu")
"""The types of devices that copy to pinned memory while the host goes on. From the others numbers are read at once."""


class Readback:
    """Copies numbers from their devices to the host, in one transfer for each device, behind the work that is queued there.

    Args:
        values: numbers, and tensors of one element each, which may be overwritten as soon as this returns.

    Example:
        >>> numbers = Readback([torch.tensor(0.5), 2])
        >>> numbers.is_ready()
        True
        >>> numbers.floats()
        [0.5, 2.0]
    """

    def __init__(self, values: Sequence[Any]) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for position, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                by_device.setdefault(value.device, []).append(position)
        self._numbers = [0.0 if isinstance(value, torch.Tensor) else float(value) for value in values]
        self._copies: list[tuple[list[int], torch.Tensor, Any]] = []
        for device, positions in by_device.items():
            stacked = stack([values[position] for position in positions])
            if device.type in ASYNCHRONOUS:
                self._copies.append((positions, *copy_to_host(stacked)))
            else:
                self._take(positions, stacked)

    def is_ready(self) -> bool:
        """Whether every number has arrived, so that :meth:`floats` doesn't wait."""
        return all(event.query() for _, _, event in self._copies)

    def floats(self) -> list[float]:
        """The numbers in the order of the values; waits for those that have not arrived."""
        for positions, numbers, event in self._copies:
            event.synchronize()
            self._take(positions, numbers)
        self._copies = []
        return self._numbers

    def _take(self, positions: list[int], numbers: torch.Tensor) -> None:
        for position, number in zip(positions, numbers.tolist(), strict=True):
            self._numbers[position] = number


def stack(numbers: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of one device and one element each as a float32 vector."""
    if any(number.dtype != torch.float32 or number.dim() for number in numbers):
        numbers = [number.to(torch.float32).reshape(()) for number in numbers]
    return torch.stack([number.detach() for number in numbers])


def copy_to_host(numbers: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Starts a copy to pinned memory. Returns the memory, and an event that has happened when the copy is complete."""
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    pinned.copy_(numbers, non_blocking=True)
    device_module = torch.get_device_module(numbers.device)
    event = device_module.Event()
    event.record(device_module.current_stream(numbers.device))
    return pinned, event
