"""Optimizers: their parameter groups, learning rates, and learning rates on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["TensorLRs", "group_rates", "groups_of", "has_own_zero_grad", "supports_tensor_lr"]


def groups_of(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def group_rates(optimizers: Sequence[Optimizer]) -> list[tuple[str, float]]:
    """The learning rate of each parameter group by name: ``"lr"``, or ``"lr/<group>"`` for several groups."""
    groups = groups_of(optimizers)
    if len(groups) == 1:
        return [("lr", float(groups[0]["lr"]))]
    names = [str(group.get("name", number)) for number, group in enumerate(groups)]
    unique = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    return [(f"lr/{name}", float(group["lr"])) for name, group in zip(unique, groups, strict=True)]


def has_own_zero_grad(optimizer: Optimizer) -> bool:
    """Whether an optimizer overrides ``zero_grad``."""
    return getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad


def supports_tensor_lr(optimizer: Optimizer) -> bool:
    """Whether a captured step can read the learning rate from a tensor; other optimizers capture its value."""
    is_fused_sgd = type(optimizer) is SGD and all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) in (Adam, AdamW) or is_fused_sgd


class TensorLRs:
    """A tensor on the device for the learning rate of each group whose optimizer can read one.

    A captured step reads it at each replay, so that a schedule needs no new graph.

    Args:
        optimizers: the optimizers.
        device: the device of their steps.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self._groups = groups_of(optimizers)
        self._tensor_groups = groups_of([optimizer for optimizer in optimizers if supports_tensor_lr(optimizer)])
        self.tensors = [torch.empty((), dtype=torch.float32, device=device) for _ in self._tensor_groups]
        """The learning rates, in the order of those groups."""
        self._values: list[Any] = [None] * len(self._tensor_groups)

    def belong_to(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether the optimizers still have the same groups; adding a group or loading a state replaces them."""
        groups = groups_of(optimizers)
        return len(groups) == len(self._groups) and all(one is other for one, other in zip(groups, self._groups, strict=True))

    def sync(self) -> None:
        """Copies the learning rates that have changed to the device."""
        for number, (group, tensor) in enumerate(zip(self._tensor_groups, self.tensors, strict=True)):
            lr = group["lr"]
            if isinstance(lr, torch.Tensor):
                tensor.copy_(lr.reshape(()), non_blocking=True)
            elif lr != self._values[number]:
                tensor.fill_(lr)
                self._values[number] = lr

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replaces the learning rates by the tensors inside the block: eager and captured steps then compute the same."""
        lrs = [group["lr"] for group in self._tensor_groups]
        for group, tensor in zip(self._tensor_groups, self.tensors, strict=True):
            group["lr"] = tensor
        try:
            yield
        finally:
            for group, lr in zip(self._tensor_groups, lrs, strict=True):
                group["lr"] = lr
