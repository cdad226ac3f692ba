"""What can be asked of a model without knowing how it is trained: wrappers, flags, freezing, counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = [
    "ParameterCount",
    "count_parameters",
    "ddp_wrapper",
    "device_of",
    "freeze",
    "fsdp_modules",
    "is_sharded",
    "matching",
    "preserve_training_mode",
    "strip_wrapper_prefixes",
    "unfreeze",
    "unwrap",
    "without_prefixes",
]

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel, DistributedDataParallel and torch.compile put in front of a model's names."""


class ParameterCount(NamedTuple):
    """The numbers of a model's parameters."""

    trainable: int
    total: int


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and ``torch.compile``, however they are nested."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def without_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose keys have lost the wrappers' prefixes that all of them share."""
    state = dict(state)
    while state:
        prefix = next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def strip_wrapper_prefixes(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under a model's own names: without the wrappers' prefixes where they are not part of these."""
    return dict(state) if set(state) == set(own) else without_prefixes(state)


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter (or buffer); the CPU for a model without any."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def preserve_training_mode(*modules: nn.Module) -> Iterator[None]:
    """Puts the training flag of every submodule back as it was, however the block is left."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts a model's parameters; one that is shared counts once.

    Args:
        model: any module.

    Returns:
        A named tuple ``(trainable, total)`` of numbers of elements.

    Example:
        >>> count_parameters(torch.nn.Linear(3, 2))
        ParameterCount(trainable=8, total=8)
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes))


def freeze(model: nn.Module, *patterns: str) -> list[str]:
    """Stops the training of the parameters whose names match, and clears their gradients.

    A frozen parameter has no ``.grad``, so neither momentum nor weight decay moves it, even where the optimizer holds it.

    Args:
        model: any module; the prefixes of DataParallel, DDP and ``torch.compile`` are not part of the names.
        patterns: ``fnmatch`` patterns over parameter names, such as ``"encoder.*"``; ``"*"`` is everything.

    Returns:
        The names of the parameters that match.

    Raises:
        ValueError: if a pattern matches no parameter.

    Example:
        >>> freeze(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), "0.*")
        ['0.weight', '0.bias']
    """
    return _set_trainable(model, patterns, trainable=False)


def unfreeze(model: nn.Module, *patterns: str) -> list[str]:
    """Lets the parameters whose names match train again.

    Args:
        model: any module.
        patterns: ``fnmatch`` patterns over parameter names.

    Returns:
        The names of the parameters that match.

    Raises:
        ValueError: if a pattern matches no parameter.

    Example:
        >>> unfreeze(torch.nn.Linear(2, 2), "bias")
        ['bias']
    """
    return _set_trainable(model, patterns, trainable=True)


def matching(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters whose names match one of the patterns, in the model's order.

    Raises:
        ValueError: if there is no pattern, or one matches nothing.
    """
    if not patterns:
        raise ValueError("name at least one pattern of parameter names, for example 'encoder.*'")
    parameters = dict(unwrap(model).named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            some = ", ".join(list(parameters)[:8]) + (", ..." if len(parameters) > 8 else "")
            raise ValueError(f"the pattern {pattern!r} matches no parameter; the model has {some or 'none'}")
    return {name: p for name, p in parameters.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _set_trainable(model: nn.Module, patterns: tuple[str, ...], trainable: bool) -> list[str]:
    found = matching(model, patterns)
    for parameter in found.values():
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None
    return list(found)


def ddp_wrapper(module: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The ``DistributedDataParallel`` that a model is, under ``torch.compile`` too; ``None`` if it is none."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.parallel.DistributedDataParallel) else None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` has been applied to a model or to parts of it."""
    return bool(fsdp_modules(module))


def fsdp_modules(module: nn.Module) -> list[Any]:
    """The outermost parts of a model that ``fully_shard`` has been applied to."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return []
    if isinstance(module, FSDPModule):
        return [module]
    return [part for child in module.children() for part in fsdp_modules(child)]
