"""The learning rates of optimizers, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

__all__ = ["group_rates"]


def group_rates(optimizers: Sequence[Optimizer]) -> list[tuple[str, float]]:
    """The learning rate of each parameter group by name."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if len(groups) == 1:
        return [("lr", float(groups[0]["lr"]))]
    names = [str(group.get("name", number)) for number, group in enumerate(groups)]
    unique = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    return [(f"lr/{name}", float(group["lr"])) for name, group in zip(unique, groups, strict=True)]
