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
    return [(f"lr/{group.get('name', number)}", float(group["lr"])) for number, group in enumerate(groups)]
