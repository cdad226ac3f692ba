"""What the graphs of a phase take for granted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from camshaft.engines.phase import Phase

__all__ = ["Surroundings"]


class Surroundings:
    """Where the tensors of a phase's network, loss and optimizers are, and what its modules are set to.

    A recording repeats what was done with the values and the memory of its time. So the modules' numbers, flags and hooks
    count as well as the places of their tensors; the modes are asked for at each window.

    Args:
        phase: the phase.
    """

    def __init__(self, phase: Phase) -> None:
        self.tensors: list[torch.Tensor] = []
        """The tensors among it."""
        self._facts: dict[str, Any] = {}
        self._modules = list(phase.module.modules())
        self._modes = [part.training for part in self._modules]
        self._parameters = list(phase.module.parameters())
        self._places = [p.data_ptr() for p in self._parameters]
        for name, module in {"model": phase.module, "loss_fn": getattr(phase.objective, "part", phase.objective)}.items():
            if isinstance(module, nn.Module):
                self._note_modules(name, module)
        self._optimizers, self._states = phase.optimizers, [len(optimizer.state) for optimizer in phase.optimizers]
        for number, optimizer in enumerate(phase.optimizers):
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    self._note(f"optimizer {number}'s {name} of parameter {id(parameter)}", value)

    def _note_modules(self, name: str, module: nn.Module) -> None:
        for place, part in module.named_modules():
            path = f"{name}.{place}" if place else name
            for key, value in vars(part).items():
                if key in ("_parameters", "_buffers"):
                    for item, tensor in value.items():
                        self._note(f"{path}.{item}", tensor)
                elif key.endswith("_hooks") and isinstance(value, Mapping):
                    self._facts[f"{path}.{key}"] = tuple(value)
                elif key != "training":
                    self._note(f"{path}.{key}", value)

    def _note(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            self._facts[name] = value.data_ptr()
        elif value is None or isinstance(value, (bool, int, float, str)):
            self._facts[name] = value

    def differing(self, other: Surroundings) -> list[str]:
        """The names of what isn't the same, or is there in one of both alone."""
        names = {**self._facts, **other._facts}
        return [name for name in names if self._facts.get(name, other) != other._facts.get(name, other)]

    def have_moved(self) -> bool:
        """Whether a parameter is elsewhere now, or a module in another mode: what is asked for at each window."""
        if [p.data_ptr() for p in self._parameters] != self._places:
            return True
        return [part.training for part in self._modules] != self._modes

    def states_have_gone(self) -> bool:
        """Whether an optimizer has lost the state that a step's graph works on."""
        return any(len(o.state) < size for o, size in zip(self._optimizers, self._states, strict=True))
