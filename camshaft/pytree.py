"""Nests of tensors: tuples, lists, dicts and dataclasses of them, at any depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

__all__ = [
    "describe",
    "detach",
    "is_strided",
    "map_tensors",
    "num_samples",
    "prepare_pair",
    "signature",
    "tensors",
    "to_device",
]


def map_tensors(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """Applies ``function`` to every tensor of a nest and keeps its structure; anything else is returned unchanged.

    Args:
        function: called with each tensor.
        batch: a tensor, or tuples, named tuples, lists, mappings and dataclasses of them at any depth.

    Returns:
        The same structure with the results. An object with a ``to`` method is returned unchanged.
    """
    if batch is None:  # the usual case of what is not a tensor, on the hot path
        return None
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, item) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, item) for item in batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        return mapped if type(batch) is dict else type(batch)(mapped)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = (field.name for field in dataclasses.fields(batch) if field.init)
        return dataclasses.replace(batch, **{name: map_tensors(function, getattr(batch, name)) for name in fields})
    return batch


def to_device(batch: Any, device: torch.device | str | None = None, non_blocking: bool = False) -> Any:
    """Moves every tensor of a batch to ``device``; a tensor that is already there is not copied.

    Args:
        batch: tensors in any nest.
        device: the target device; ``None`` leaves the tensors where they are.
        non_blocking: lets copies from pinned memory overlap with computation.

    Returns:
        The batch in the same structure. An object with a ``to`` method (a packed sequence, say) is moved by that method.
    """
    if device is None:
        return batch
    if isinstance(batch, torch.Tensor):  # the usual case, on the hot path
        return batch.to(device, non_blocking=non_blocking)
    if hasattr(batch, "to"):
        return batch.to(device)
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), batch)


def detach(value: Any) -> Any:
    """``value`` with every tensor detached."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return map_tensors(torch.Tensor.detach, value)


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a nest, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from tensors(item)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors(getattr(batch, field.name))


def is_strided(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense: neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def signature(batch: Any, found: list[torch.Tensor]) -> Hashable:
    """The input signature of a batch: two batches with the same one can use the same CUDA graph.

    Args:
        batch: tensors in any nest.
        found: a list to which every tensor is appended, in the order of :func:`map_tensors`.

    Returns:
        The structure, with the shape, strides, dtype and device of each tensor, and the value of everything else.

    Raises:
        TypeError: if something that is not a tensor is not hashable.
    """
    if batch is None or type(batch) is float:
        return batch
    if isinstance(batch, torch.Tensor):
        found.append(batch)
        if batch.is_nested:
            return id(batch)
        strides = batch.stride() if is_strided(batch) else batch.layout
        return batch.shape, strides, batch.dtype, batch.device, batch.requires_grad
    if isinstance(batch, (list, tuple)):
        return type(batch), *[signature(item, found) for item in batch]
    if isinstance(batch, Mapping):
        return type(batch), *[(key, signature(value, found)) for key, value in batch.items()]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if field.init]
        return type(batch), *[signature(getattr(batch, name), found) for name in names]
    if not isinstance(batch, Hashable):
        raise TypeError(
            f"capture=True: {describe(batch)} in a batch can't be compared with that of the next; turn it into a tensor"
        )
    return type(batch), batch


def num_samples(batch: Any) -> int | None:
    """The number of samples: the length of the first tensor that has one; ``None`` if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else None
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], torch.Tensor) and batch[0].dim():
        return int(batch[0].shape[0])  # the usual case, on the hot path
    return next((tensor.shape[0] for tensor in tensors(batch) if tensor.dim()), None)


def prepare_pair(batch: Any, device: torch.device | str | None = None, non_blocking: bool = False) -> tuple[Any, Any]:
    """The default ``prepare_batch``: unpacks ``(x, y)`` and moves both to the device.

    Args:
        batch: a tuple or list of two; each may be a tensor or any nest of tensors.
        device: the target device.
        non_blocking: lets copies from pinned memory overlap with computation.

    Returns:
        ``(x, y)`` on the device.

    Raises:
        TypeError: if the batch is not a pair.

    Example:
        >>> x, y = prepare_pair((torch.zeros(4, 2), torch.zeros(4)))
        >>> x.shape
        torch.Size([4, 2])
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"a batch must be a pair (x, y), got {describe(batch)}; pass prepare_batch=, a function of "
            "(batch, device, non_blocking) that returns (x, y), or compute_loss= for another objective"
        )
    x, y = batch
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):  # the usual case, on the hot path
        x = x if device is None or x.device == device else x.to(device, non_blocking=non_blocking)
        y = y if device is None or y.device == device else y.to(device, non_blocking=non_blocking)
        return x, y
    return to_device(x, device, non_blocking), to_device(y, device, non_blocking)


def describe(value: Any) -> str:
    """The type and size of a value, for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' or name == 'ndarray' else 'a'} {name}"
