"""What the graphs of a phase take for agreed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from camshaft.pytree import is_strided

if TYPE_CHECKING:
    from camshaft.engines.phase import Phase

__all__ = ["Surroundings"]

MOST_ITEMS = 64
"""The items of a list or a mapping up to which it is looked into; a longer one is data rather than a setting."""


class Surroundings:
    """Where the tensors of a phase's network, loss and optimizers are, and what its modules are set to.

    A recording repeats what was done with the values and the memory of its time. So the modules' numbers, flags and hooks
    count as well as the places of their tensors; the modes are asked for more often.

    Args:
        phase: the phase.
    """

    def __init__(self, phase: Phase) -> None:
        self.tensors: list[torch.Tensor] = []
        """The tensors among it."""
        self._loss = getattr(phase.objective, "loss_fn", phase.objective)
        self._facts: dict[str, Any] = {"the loss": id(self._loss)}
        self._kept: list[tuple[dict[str, Any], str, Any]] = []
        roots = {"model": phase.module, "loss_fn": getattr(self._loss, "__self__", self._loss)}  # a method's module
        named = {name: root for name, root in roots.items() if isinstance(root, nn.Module)}
        self._modules = [module for root in named.values() for module in root.modules()]
        self._modes = [module.training for module in self._modules]
        held = (p for root in named.values() for p in root.parameters())
        self._parameters = list(dict.fromkeys((*phase.parameters(), *held)))
        self._places = [p.data_ptr() for p in self._parameters]
        self._trained = [p.requires_grad for p in self._parameters]
        for name, root in named.items():
            for place, module in root.named_modules():
                self._note_module(f"{name}.{place}" if place else name, module)
        self._settings = dict(self._facts)
        self._optimizers, self._states = phase.optimizers, [len(optimizer.state) for optimizer in phase.optimizers]
        for number, optimizer in enumerate(phase.optimizers):
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    self._note(f"optimizer {number}'s {key} of parameter {id(parameter)}", value)

    def _note_module(self, path: str, module: nn.Module) -> None:
        self._facts[path] = id(module)
        settings = vars(module)
        for held in (settings, settings["_parameters"], settings["_buffers"]):
            for key, value in held.items():
                name = f"{path}.{key}"
                if key.endswith("_hooks") and isinstance(value, Mapping):
                    self._facts[name] = tuple(value)
                elif key not in ("training", "_parameters", "_buffers", "_modules"):
                    self._note(name, value)
                    self._kept.append((held, key, value))
        for key, parameter in settings["_parameters"].items():
            hooks = () if parameter is None else (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
            self._facts[f"the hooks of {path}.{key}"] = [tuple(hook or ()) for hook in hooks]

    def _note(self, name: str, value: Any) -> None:
        for place, item in items_of(value):
            if isinstance(item, torch.Tensor):
                self.tensors.append(item)
                self._facts[name + place] = item.data_ptr() if is_strided(item) else id(item)
            else:
                self._facts[name + place] = repr(item)  # a NaN is the same as itself

    def differing(self, earlier: Surroundings) -> list[str]:
        """The names of what isn't as it was earlier; an optimizer may have made states since."""
        names = {**self._settings, **earlier._facts}
        return [name for name in names if self._facts.get(name, earlier) != earlier._facts.get(name, earlier)]

    def restore(self) -> None:
        """Puts back what the modules' attributes were."""
        for held, key, value in self._kept:
            held[key] = value

    def have_moved(self) -> bool:
        """Whether a parameter is elsewhere now or has been frozen, or a module is in another mode: asked for at each batch."""
        if list(map(torch.Tensor.data_ptr, self._parameters)) != self._places:
            return True
        if [p.requires_grad for p in self._parameters] != self._trained:
            return True
        return [module.training for module in self._modules] != self._modes

    def states_have_gone(self) -> bool:
        """Whether an optimizer has lost the state that a step's graph works on."""
        return any(len(o.state) < size for o, size in zip(self._optimizers, self._states, strict=True))


def items_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of a setting, with their places in it."""
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
        yield "", value
    elif isinstance(value, (list, tuple, Mapping)) and len(value) <= MOST_ITEMS:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            for place, inner in items_of(item):
                yield f"[{key!r}]{place}", inner
