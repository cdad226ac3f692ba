"""Models: wrappers, training modes, freezing, counting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    "is_compiled",
    "is_sharded",
    "load_plain_state_dict",
    "matching",
    "plain_name",
    "plain_named_parameters",
    "plain_state_dict",
    "preserve_training_mode",
    "strip_wrapper_prefixes",
    "unfreeze",
    "unwrap",
    "without_prefixes",
]

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""The prefixes that DataParallel, DistributedDataParallel and torch.compile add to parameter names."""


class ParameterCount(NamedTuple):
    """The number of parameters of a model."""

    trainable: int
    total: int


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and ``torch.compile``, in any nesting."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def without_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the wrappers' prefixes that all of its keys share."""
    state = dict(state)
    while state:
        prefix = next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def strip_wrapper_prefixes(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the model's plain names: without what wrappers add, unless it is part of these names.

    Args:
        state: the state dict, from a model that may have been wrapped or compiled, as a whole or in parts.
        own: the model's own, from :func:`plain_state_dict`; only its keys are used.
    """
    if state.keys() == own.keys():
        return dict(state)
    names = plain_names(state)
    plain = {names[name]: value for name, value in state.items()}
    return plain if plain.keys() == own.keys() else without_prefixes(plain)


def plain_name(name: str) -> str:
    """The name of a parameter or buffer without what ``torch.compile`` adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name of a model's parameters or buffers with its plain name; unchanged if two plain names would be the same."""
    plain = {name: plain_name(name) for name in names}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def plain_state_dict(module: nn.Module) -> dict[str, Any]:
    """A model's state dict under the names that it has if neither it nor a part of it is wrapped or compiled."""
    state = unwrap(module).state_dict()
    names = plain_names(state)
    return {names[name]: value for name, value in state.items()}


def load_plain_state_dict(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads a state dict under plain names, or under those of another wrapper, into a model that may be wrapped or compiled.

    Raises:
        RuntimeError: if it belongs to another model.
    """
    inner = unwrap(module)
    own = {plain: name for name, plain in plain_names(inner.state_dict()).items()}
    inner.load_state_dict({own.get(name, name): value for name, value in strip_wrapper_prefixes(state, own).items()})


def plain_named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model under the names of :func:`plain_state_dict`; a shared one has its first name."""
    parameters = dict(unwrap(module).named_parameters())
    names = plain_names(parameters)
    return {names[name]: parameter for name, parameter in parameters.items()}


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter (or buffer); the CPU for a model without any."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def preserve_training_mode(*modules: nn.Module) -> Iterator[None]:
    """Restores the training flag of every submodule after the block."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of a model; a shared one counts once.

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
    """Freezes the parameters whose names match, and clears their gradients.

    A frozen parameter has no ``.grad``, so neither momentum nor weight decay changes it, even if the optimizer has it.

    Args:
        model: any module; what DataParallel, DDP and ``torch.compile`` add to the names is not part of them.
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
    """Unfreezes the parameters whose names match.

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
    parameters = plain_named_parameters(model)
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


def is_compiled(module: nn.Module) -> bool:
    """Whether a model or a part of it has been compiled by ``torch.compile`` or ``Module.compile``."""
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in module.modules())


def ddp_wrapper(module: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The model itself if it is a ``DistributedDataParallel`` (compiled or not), otherwise ``None``."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.parallel.DistributedDataParallel) else None


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) has been applied to a model or to parts of it."""
    return bool(fsdp_modules(module))


def fsdp_modules(module: nn.Module) -> list[Any]:
    """The outermost modules of a model to which ``fully_shard`` has been applied."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return []
    if isinstance(module, FSDPModule):
        return [module]
    return [part for child in module.children() for part in fsdp_modules(child)]
