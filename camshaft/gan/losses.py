"""The losses of generative adversarial networks, as functions of real scores ``r`` and fake scores ``f``."""

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
    """The critic's loss: minus the estimate of the Wasserstein distance (Arjovsky et al. 2017, https://arxiv.org/abs/1701.07875)."""
    return f.mean() - r.mean()


def wgan_generator(f: torch.Tensor) -> torch.Tensor:
    """The generator's loss: minus the mean fake score."""
    return -f.mean()


def hinge(r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss (Lim and Ye 2017, https://arxiv.org/abs/1705.02894)."""
    return relu(1 - r).mean() + relu(1 + f).mean()


def non_saturating(r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss: the cross-entropy of logits (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661)."""
    return softplus(-r).mean() + softplus(f).mean()


def non_saturating_generator(f: torch.Tensor) -> torch.Tensor:
    """The generator's loss, whose gradient does not vanish for a confident discriminator."""
    return softplus(-f).mean()


def least_squares(r: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss (Mao et al. 2016, https://arxiv.org/abs/1611.04076)."""
    return 0.5 * ((r - 1).square().mean() + f.square().mean())


def least_squares_generator(f: torch.Tensor) -> torch.Tensor:
    """The generator's loss: the squared distance of the fake scores from 1."""
    return 0.5 * (f - 1).square().mean()


LOSSES: dict[str, tuple[DiscriminatorLoss, GeneratorLoss]] = {
    "wgan": (wgan, wgan_generator),
    "hinge": (hinge, wgan_generator),
    "non_saturating": (non_saturating, non_saturating_generator),
    "least_squares": (least_squares, least_squares_generator),
}
"""The losses by name: the discriminator's, and the generator's."""


def loss_pair(loss: Any) -> tuple[DiscriminatorLoss, GeneratorLoss]:
    """The two losses of a ``loss`` argument.

    Raises:
        ValueError: if no loss has this name.
        TypeError: if it is neither a name nor a pair of callables.
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
