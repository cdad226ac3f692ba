"""Whether a pass over the data returns as many batches as its length says."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from camshaft.resume.data_position import length_of

__all__ = ["check_not_longer", "check_not_shorter", "pass_length"]

UNKNOWN = float("inf")


def pass_length(state: Any) -> float:
    """The number of batches in a pass over the data; infinite if unknown, or if an epoch has another length."""
    length = length_of(state.dataloader)
    return UNKNOWN if length is None or length != state.epoch_length else length


def check_not_shorter(state: Any, fetched: int) -> None:
    """Raises ``RuntimeError`` if the data has ended before its length."""
    length = pass_length(state)
    if 0 < fetched < length < UNKNOWN:
        raise RuntimeError(
            f"the data ended after {fetched} batches, but its length is {length}: either its __len__ is wrong, or a "
            "StopIteration has come out of the dataset. Correct it, or give run() the epoch_length"
        )


def check_not_longer(state: Any, fetched: int) -> None:
    """Raises ``RuntimeError`` if the data has returned more batches than its length."""
    data, length = state.dataloader, pass_length(state)
    is_estimate = isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset)  # workers may add batches
    if fetched > length and not is_estimate:
        raise RuntimeError(
            f"the data returns more batches than its length, {length}: the next epoch would start in the middle of it. "
            "Correct its __len__, or give run() the epoch_length"
        )
