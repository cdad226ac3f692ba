"""What the graphs of a phase rely on: addresses, settings, modes and hooks that must not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from camshaft.protocols import PhaseLike
from camshaft.pytree import is_strided

__all__ = ["Guards", "addresses"]

MAX_ITEMS = 64
"""The length up to which a list or mapping counts as a setting; a longer one is data."""


class Guards:
    """The addresses of the tensors of a phase's network, loss and optimizers, and the settings of its modules.

    A graph repeats what was done with the values and the memory at capture. So numbers, flags and hooks of the modules are
    guarded as well as the addresses of their tensors. The modes are guarded too, by the cheaper :meth:`addresses_changed`.

    Args:
        phase: the phase.
    """

    def __init__(self, phase: PhaseLike) -> None:
        self.tensors: list[torch.Tensor] = []
        """Every guarded tensor."""
        self._loss = phase.objective.loss_fn
        self._facts: dict[str, Any] = {"the loss": id(self._loss)}
        self._kept: list[tuple[dict[str, Any], str, Any]] = []
        roots = {"model": phase.module, "loss_fn": getattr(self._loss, "__self__", self._loss)}  # the module of a bound method
        named = {name: root for name, root in roots.items() if isinstance(root, nn.Module)}
        self._modules = [module for root in named.values() for module in root.modules()]
        self._modes = [module.training for module in self._modules]
        held = (p for root in named.values() for p in root.parameters())
        self._parameters = list(dict.fromkeys((*phase.parameters(), *held)))
        self._addresses = [p.data_ptr() for p in self._parameters]
        self._trained = [p.requires_grad for p in self._parameters]
        for name, root in named.items():
            for path, module in root.named_modules():
                self._add_module(f"{name}.{path}" if path else name, module)
        self._settings = dict(self._facts)
        self._optimizers, self._states = phase.optimizers, [len(optimizer.state) for optimizer in phase.optimizers]
        for number, optimizer in enumerate(phase.optimizers):
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    self._add(f"optimizer {number}'s {key} of parameter {id(parameter)}", value)

    def _add_module(self, path: str, module: nn.Module) -> None:
        self._facts[path] = id(module)
        settings = vars(module)
        for held in (settings, settings["_parameters"], settings["_buffers"]):
            for key, value in held.items():
                name = f"{path}.{key}"
                if key.endswith("_hooks") and isinstance(value, Mapping):
                    self._facts[name] = tuple(value)
                elif key not in ("training", "_parameters", "_buffers", "_modules"):
                    self._add(name, value)
                    self._kept.append((held, key, value))
        for key, parameter in settings["_parameters"].items():
            hooks = () if parameter is None else (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
            self._facts[f"the hooks of {path}.{key}"] = [tuple(hook or ()) for hook in hooks]

    def _add(self, name: str, value: Any) -> None:
        for path, item in items_of(value):
            if isinstance(item, torch.Tensor):
                self.tensors.append(item)
                self._facts[name + path] = item.data_ptr() if is_strided(item) else id(item)
            else:
                self._facts[name + path] = repr(item)  # so that NaN equals NaN

    def changed(self, earlier: Guards) -> list[str]:
        """The names of what differs from earlier guards; states that an optimizer has created since do not count."""
        names = {**self._settings, **earlier._facts}
        return [name for name in names if self._facts.get(name, earlier) != earlier._facts.get(name, earlier)]

    def restore(self) -> None:
        """Restores the attributes of the modules."""
        for held, key, value in self._kept:
            held[key] = value

    def addresses_changed(self) -> bool:
        """Whether a parameter has moved or was frozen, or a module has changed its mode; cheap enough for every batch."""
        if addresses(self._parameters) != self._addresses:
            return True
        if [p.requires_grad for p in self._parameters] != self._trained:
            return True
        return [module.training for module in self._modules] != self._modes

    def optimizer_state_lost(self) -> bool:
        """Whether an optimizer has lost the state that a captured step updates."""
        return any(len(o.state) < size for o, size in zip(self._optimizers, self._states, strict=True))


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The addresses of tensors in memory."""
    return list(map(torch.Tensor.data_ptr, tensors))


def items_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the tensors and plain values of a setting, with their paths in it."""
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
        yield "", value
    elif isinstance(value, (list, tuple, Mapping)) and len(value) <= MAX_ITEMS:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            for path, inner in items_of(item):
                yield f"[{key!r}]{path}", inner
