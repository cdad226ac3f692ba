"""A small critic, its samples, and one penalty of each kind."""

from __future__ import annotations

import torch
from torch import nn

from camshaft import DRAGAN, R1, R2, GradientPenalty

PENALTIES = [GradientPenalty(), DRAGAN(), R1(), R2()]


class Critic(nn.Module):
    """A smooth critic for samples of any shape. It can return the scores in reverse order."""

    def __init__(self, shape: tuple[int, ...], permuted: bool = False) -> None:
        super().__init__()
        size = torch.Size(shape[1:]).numel()
        self.first, self.last, self.permuted = nn.Linear(size, 6), nn.Linear(6, 1), permuted

    def forward(self, x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        hidden = torch.tanh(self.first(x.reshape(len(x), -1)))
        scores = self.last(hidden) * scale
        return scores.flip(0) if self.permuted else scores


def samples(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=torch.float64).to(dtype), 2 * torch.randn(shape, dtype=torch.float64).to(dtype)
