"""The losses of generative adversarial networks, of real scores ``r`` and fake scores ``f``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import relu, softplus

from camshaft.validation import name_of

__all__ = ["LOSSES", "loss_pair"]

DiscriminatorLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
GeneratorLoss = Callable[[torch.Tensor], torch.Tensor]


def wgan(r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The critic's: minus the Wasserstein estimate (Arjovsky et al. 2017, https://arxiv.org/abs/1701.07875)."""
    return f.mean() - r.mean()


def raised_scores(f: torch.Tensor) -> torch.Tensor:
    """The generator's: the fake scores shall rise."""
    return -f.mean()


def hinge(r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The discriminator's (Lim and Ye 2017, https://arxiv.org/abs/1705.02894)."""
    return relu(1 - r).mean() + relu(1 + f).mean()


def non_saturating(r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The discriminator's cross-entropy of logits (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661)."""
    return softplus(-r).mean() + softplus(f).mean()


def non_saturating_generator(f: torch.Tensor) -> torch.Tensor:
    """The generator's, which doesn't vanish where the discriminator is sure."""
    return softplus(-f).mean()


def least_squares(r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The discriminator's (Mao et al. 2016, https://arxiv.org/abs/1611.04076)."""
    return 0.5 * ((r - 1).square().mean() + f.square().mean())


def least_squares_generator(f: torch.Tensor) -> torch.Tensor:
    """The generator's: the fake scores shall be 1."""
    return 0.5 * (f - 1).square().mean()


LOSSES: dict[str, tuple[DiscriminatorLoss, GeneratorLoss]] = {
    "wgan": (wgan, raised_scores),
    "hinge": (hinge, raised_scores),
    "non_saturating": (non_saturating, non_saturating_generator),
    "least_squares": (least_squares, least_squares_generator),
}
"""By name: the discriminator's, of both scores, and the generator's, of the fake ones."""


def loss_pair(loss: Any) -> tuple[DiscriminatorLoss, GeneratorLoss]:
    """The two losses that a name, or a pair of callables, stands for.

    Raises:
        ValueError: where there is no loss of this name.
        TypeError: where it is neither a name nor a pair of callables.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))} or a pair of callables, got {loss!r}")
        return LOSSES[loss]
    if isinstance(loss, (tuple, list)) and len(loss) == 2 and all(callable(part) for part in loss):
        return loss[0], loss[1]
    shown = [name_of(part) if callable(part) else part for part in loss] if isinstance(loss, (tuple, list)) else loss
    raise TypeError(
        "loss must be a name or a pair of callables (discriminator_loss(real_scores, fake_scores), "
        f"generator_loss(fake_scores)), got {shown!r}"
    )
