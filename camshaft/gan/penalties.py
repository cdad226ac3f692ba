"""Penalties on the gradient of a critic's scores with respect to its input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from camshaft.gan.input_gradients import input_gradients, to_float32
from camshaft.pytree import describe
from camshaft.validation import check_count, check_non_negative

__all__ = ["DRAGAN", "GradientPenalty", "Penalty", "R1", "R2", "gradient_penalty"]


def gradient_penalty(
    critic: Any,
    real: torch.Tensor,
    fake: torch.Tensor,
    *args: Any,
    weight: float = 10.0,
    center: float = 1.0,
    one_sided: bool = False,
    alpha: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient penalty of WGAN-GP: ``weight * mean((norm - center)**2)`` at points between real and fake samples.

    The points are ``alpha * real + (1 - alpha) * fake`` with one ``alpha`` per sample, and the norm is that of each sample,
    over all its dimensions (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028). It is computed in float32
    outside autocast (in float64 for float64 samples), is finite at zero norm, and only the critic's parameters get
    gradients.

    Args:
        critic: called as ``critic(points, *args)``; returns one number per sample.
        real: real samples of shape ``(batch, ...)``, in any memory format.
        fake: generated samples of the same shape.
        args: further arguments of the critic, such as labels.
        weight: the factor before the mean.
        center: the target norm.
        one_sided: penalizes only norms above ``center``.
        alpha: the weight of the real sample in each point, of shape ``(batch,)``; by default uniform between 0 and 1.

    Returns:
        A scalar.

    Raises:
        TypeError: if the samples are not floating-point tensors or the critic can't be called.
        ValueError: if shapes do not match, the critic does not return one number per sample, or is under ``fully_shard``.
        RuntimeError: under ``no_grad``: the penalty could not train anything.

    Example:
        >>> critic = torch.nn.Linear(3, 1)
        >>> real, fake = torch.ones(4, 3), torch.zeros(4, 3)
        >>> gradient_penalty(critic, real, fake).backward()
        >>> critic.weight.grad.shape
        torch.Size([1, 3])
    """
    gradients = input_gradients(critic, between(real, fake, alpha), args)
    return weight * distance(gradients, center, one_sided)


class Penalty:
    """A penalty on the gradient of a critic's scores with respect to its input.

    A subclass defines the points at which the gradient is computed, and the measure of its size. The penalty is called as
    ``penalty(critic, real, fake, *args)``, passes ``args`` to the critic, and returns the weighted scalar. As in
    :func:`gradient_penalty` it is computed in float32 outside autocast, for samples of any rank, and finite at zero norm.

    Args:
        weight: the factor before the mean.
        every: applies the penalty on every n-th discriminator step, with the weight multiplied by n ("lazy regularization",
            Karras et al. 2020, https://arxiv.org/abs/1912.04958). The GAN engine counts the steps; each call uses the
            multiplied weight.

    Raises:
        ValueError: if a number is out of range.
    """

    settings: ClassVar[tuple[str, ...]] = ("weight", "every")

    def __init__(self, weight: float = 10.0, *, every: int = 1) -> None:
        self.weight = check_non_negative(weight, f"weight of {type(self).__name__}")
        self.every = check_count(every, f"every of {type(self).__name__}")

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """The points at which the gradient is computed; of the samples' shape."""
        raise NotImplementedError

    def measure(self, gradients: torch.Tensor) -> torch.Tensor:
        """The unweighted penalty, a scalar, of gradients of shape (batch, elements of a sample)."""
        raise NotImplementedError

    def __call__(self, critic: Any, real: torch.Tensor, fake: torch.Tensor, *args: Any) -> torch.Tensor:
        """The weighted penalty, a scalar."""
        gradients = input_gradients(critic, self.points(real, fake), args)
        return self.weight * self.every * self.measure(gradients)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"


class GradientPenalty(Penalty):
    """The penalty of WGAN-GP; see :func:`gradient_penalty`.

    Args:
        weight: the factor before the mean.
        center: the target norm; 0 gives the zero-centered penalty.
        one_sided: penalizes only norms above ``center``.
        every: applies it on every n-th discriminator step, with the weight multiplied by n.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> GradientPenalty(weight=5.0, every=4)
        GradientPenalty(weight=5.0, center=1.0, one_sided=False, every=4)
    """

    settings = ("weight", "center", "one_sided", "every")

    def __init__(self, weight: float = 10.0, center: float = 1.0, one_sided: bool = False, every: int = 1) -> None:
        super().__init__(weight, every=every)
        self.center = check_non_negative(center, f"center of {type(self).__name__}")
        self.one_sided = bool(one_sided)

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Points between each generated sample and its real one."""
        return between(real, fake)

    def measure(self, gradients: torch.Tensor) -> torch.Tensor:
        """The mean squared distance of the norms from ``center``."""
        return distance(gradients, self.center, self.one_sided)


class DRAGAN(Penalty):
    """Pulls the norm of the gradient toward 1 around the real data (Kodali et al. 2017, https://arxiv.org/abs/1705.07215).

    Args:
        weight: the factor before the mean.
        std: the standard deviation of the Gaussian noise that is added to the real samples.
        center: the target norm.
        every: applies it on every n-th discriminator step, with the weight multiplied by n.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> penalty = DRAGAN(std=0.1)
        >>> penalty(torch.nn.Linear(3, 1), torch.ones(4, 3), torch.zeros(4, 3)).shape
        torch.Size([])
    """

    settings = ("weight", "std", "center", "every")

    def __init__(self, weight: float = 10.0, std: float = 0.5, *, center: float = 1.0, every: int = 1) -> None:
        super().__init__(weight, every=every)
        self.std = check_non_negative(std, f"std of {type(self).__name__}")
        self.center = check_non_negative(center, f"center of {type(self).__name__}")

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Points around the real samples."""
        real = to_float32(real, "real")
        return real + self.std * torch.randn_like(real)

    def measure(self, gradients: torch.Tensor) -> torch.Tensor:
        """The mean squared distance of the norms from ``center``."""
        return distance(gradients, self.center)


class R1(Penalty):
    """``weight / 2`` times the mean squared norm of the gradient on real samples (Mescheder et al. 2018,
    https://arxiv.org/abs/1801.04406).

    Args:
        weight: twice the factor before the mean: the paper's gamma.
        every: applies it on every n-th discriminator step, with the weight multiplied by n.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> R1(every=16)
        R1(weight=10.0, every=16)
    """

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """The real samples."""
        return to_float32(real, "real")

    def measure(self, gradients: torch.Tensor) -> torch.Tensor:
        """Half of the mean squared norm."""
        return gradients.square().sum(1).mean() / 2


class R2(R1):
    """The same as :class:`R1`, on generated samples.

    Args:
        weight: twice the factor before the mean.
        every: applies it on every n-th discriminator step, with the weight multiplied by n.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> R2(weight=1.0)
        R2(weight=1.0, every=1)
    """

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """The generated samples."""
        return to_float32(fake, "fake")


def between(real: torch.Tensor, fake: torch.Tensor, alpha: torch.Tensor | None = None) -> torch.Tensor:
    """A random point on the line between each fake sample and its real one.

    Raises:
        ValueError: if shapes do not match.
    """
    real, fake = to_float32(real, "real"), to_float32(fake, "fake")
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have the same shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    ones = [1] * (real.dim() - 1)
    if alpha is None:
        dtype = real.dtype if real.dtype is fake.dtype else torch.promote_types(real.dtype, fake.dtype)
        alpha = torch.rand(real.shape[0], *ones, dtype=dtype, device=real.device)
    elif not isinstance(alpha, torch.Tensor) or alpha.shape != real.shape[:1]:
        raise ValueError(f"alpha must be a tensor of shape ({real.shape[0]},), one number per sample, got {describe(alpha)}")
    else:
        alpha = alpha.detach().to(real).reshape(-1, *ones)
    return alpha * real + (1 - alpha) * fake


def distance(gradients: torch.Tensor, center: float, one_sided: bool = False) -> torch.Tensor:
    """The mean squared distance of each sample's gradient norm from ``center``."""
    norms: torch.Tensor = torch.linalg.vector_norm(gradients, dim=1)  # its derivative at 0 is 0; that of a square root is NaN
    excess = norms - center
    return (excess.clamp_min(0) if one_sided else excess).square().mean()
