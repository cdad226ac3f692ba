"""The learning rates of optimizers, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["DeviceRates", "group_rates", "has_own_zero_grad", "takes_tensor_rate"]


def group_rates(optimizers: Sequence[Optimizer]) -> list[tuple[str, float]]:
    """The learning rate of each parameter group by name."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if len(groups) == 1:
        return [("lr", float(groups[0]["lr"]))]
    names = [str(group.get("name", number)) for number, group in enumerate(groups)]
    unique = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    return [(f"lr/{name}", float(group["lr"])) for name, group in zip(unique, groups, strict=True)]


class DeviceRates:
    """A tensor for each parameter group whose optimizer can read its learning rate on the device.

    A graph of a step reads it anew at each replay, so that a schedule needs no other graph.

    Args:
        optimizers: the optimizers.
        device: where their steps run.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self._groups = groups_of(optimizers)
        self._steered = groups_of([optimizer for optimizer in optimizers if takes_tensor_rate(optimizer)])
        self.tensors = [torch.empty((), dtype=torch.float32, device=device) for _ in self._steered]
        """The rates, in the order of those groups."""
        self._known: list[Any] = [None] * len(self._steered)

    def are_of(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether the optimizers have the same groups still: not so where one has another, or has loaded a state."""
        groups = groups_of(optimizers)
        return len(groups) == len(self._groups) and all(one is other for one, other in zip(groups, self._groups, strict=True))

    def follow(self) -> None:
        """Brings the tensors to the rates of the groups, where these have changed."""
        for number, (group, rate) in enumerate(zip(self._steered, self.tensors, strict=True)):
            wanted = group["lr"]
            if isinstance(wanted, torch.Tensor):
                rate.copy_(wanted.reshape(()), non_blocking=True)
            elif wanted != self._known[number]:
                rate.fill_(wanted)
                self._known[number] = wanted

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the optimizers the tensors inside the block, with and without a graph, so that both do the same sums."""
        kept = [group["lr"] for group in self._steered]
        for group, rate in zip(self._steered, self.tensors, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, wanted in zip(self._steered, kept, strict=True):
                group["lr"] = wanted


def groups_of(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """The parameter groups of all of them."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def takes_tensor_rate(optimizer: Optimizer) -> bool:
    """Whether a learning rate can be a tensor that the step reads on the device; any other is recorded as it was."""
    return type(optimizer) in (Adam, AdamW) or (type(optimizer) is SGD and all(g.get("fused") for g in optimizer.param_groups))


def has_own_zero_grad(optimizer: Optimizer) -> bool:
    """Whether an optimizer lets go of its gradients in another way than torch's do."""
    return getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad
