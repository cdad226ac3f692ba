"""Penalties on a critic's gradient with respect to its input, and the traps that they lay."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from camshaft.models import is_sharded
from camshaft.pytree import describe, map_tensors
from camshaft.validation import check_count, name_of

__all__ = ["DRAGAN", "GradientPenalty", "HALF", "Penalty", "R1", "R2", "bad_scores", "gradient_penalty", "look_at", "one_each"]

HALF = (torch.float16, torch.bfloat16)


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

    The points are ``alpha * real + (1 - alpha) * fake`` with an ``alpha`` for each sample, and the norm is each sample's
    own, over all its dimensions (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028). It is computed in float32
    outside autocast (in float64 where the samples are), is finite at zero norm, and sends gradients to the critic's
    parameters only.

    Args:
        critic: called as ``critic(points, *args)``, gives one number per sample.
        real: real samples, of any rank with the batch first, in any memory format.
        fake: generated samples of the same shape.
        args: whatever else the critic takes, such as the labels of a conditional one.
        weight: the factor before the mean.
        center: the norm that is wanted.
        one_sided: only norms above ``center`` count.
        alpha: the share of the real sample in each point, of shape ``(batch,)``; drawn uniformly from 0 to 1 by default.

    Returns:
        A scalar.

    Raises:
        TypeError: where the samples aren't floating-point tensors or the critic can't be called.
        ValueError: where shapes don't match, the critic doesn't give one number per sample, or is under ``fully_shard``.
        RuntimeError: under ``no_grad``, where the penalty could train nothing.

    Example:
        >>> critic = nn.Linear(3, 1)
        >>> real, fake = torch.ones(4, 3), torch.zeros(4, 3)
        >>> gradient_penalty(critic, real, fake).backward()
        >>> critic.weight.grad.shape
        torch.Size([1, 3])
    """
    gradients = input_gradients(critic, between(real, fake, alpha), args)
    return weight * distance(gradients, center, one_sided)


class Penalty:
    """A penalty on the gradient of the critic's scores with respect to its input: at some points, by some measure.

    A subclass gives both. The penalty is called as ``penalty(critic, real, fake, *args)``, where ``args`` go on to the
    critic, and gives the weighted scalar. What holds of :func:`gradient_penalty` (float32 outside autocast, any rank,
    detached inputs, finite at zero norm) holds of each.

    Args:
        weight: the factor before the mean.
        every: applies it on every so many discriminator steps only, with the weight multiplied by as many ("lazy
            regularisation", Karras et al. 2020, https://arxiv.org/abs/1912.04958). The GAN engine counts the steps; a call
            is always made with the multiplied weight.

    Raises:
        ValueError: where a number is out of range.
    """

    settings: ClassVar[tuple[str, ...]] = ("weight", "every")

    def __init__(self, weight: float = 10.0, *, every: int = 1) -> None:
        check_number(weight, "weight", type(self).__name__)
        check_count(every, f"every of {type(self).__name__}")
        self.weight, self.every = float(weight), every

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Where the gradient is taken; of the samples' shape."""
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
        center: the norm that is wanted; 0 gives the zero-centred penalty.
        one_sided: only norms above ``center`` count.
        every: applies it on every so many discriminator steps, with the weight multiplied by as many.

    Raises:
        ValueError: where a number is out of range.

    Example:
        >>> GradientPenalty(weight=5.0, every=4)
        GradientPenalty(weight=5.0, center=1.0, one_sided=False, every=4)
    """

    settings = ("weight", "center", "one_sided", "every")

    def __init__(self, weight: float = 10.0, center: float = 1.0, one_sided: bool = False, every: int = 1) -> None:
        super().__init__(weight, every=every)
        check_number(center, "center", type(self).__name__)
        self.center, self.one_sided = float(center), bool(one_sided)

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """On the line from each generated sample to the real one."""
        return between(real, fake)

    def measure(self, gradients: torch.Tensor) -> torch.Tensor:
        """The mean squared distance of the norms from ``center``."""
        return distance(gradients, self.center, self.one_sided)


class DRAGAN(Penalty):
    """The gradient's norm is drawn to 1 around the real data (Kodali et al. 2017, https://arxiv.org/abs/1705.07215).

    Args:
        weight: the factor before the mean.
        std: the standard deviation of the Gaussian noise that is added to the real samples.
        center: the norm that is wanted.
        every: applies it on every so many discriminator steps, with the weight multiplied by as many.

    Raises:
        ValueError: where a number is out of range.

    Example:
        >>> penalty = DRAGAN(std=0.1)
        >>> penalty(nn.Linear(3, 1), torch.ones(4, 3), torch.zeros(4, 3)).shape
        torch.Size([])
    """

    settings = ("weight", "std", "center", "every")

    def __init__(self, weight: float = 10.0, std: float = 0.5, *, center: float = 1.0, every: int = 1) -> None:
        super().__init__(weight, every=every)
        check_number(std, "std", type(self).__name__)
        check_number(center, "center", type(self).__name__)
        self.std, self.center = float(std), float(center)

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Around the real samples."""
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
        every: applies it on every so many discriminator steps, with the weight multiplied by as many.

    Raises:
        ValueError: where a number is out of range.

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
        every: applies it on every so many discriminator steps, with the weight multiplied by as many.

    Raises:
        ValueError: where a number is out of range.

    Example:
        >>> R2(weight=1.0)
        R2(weight=1.0, every=1)
    """

    def points(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """The generated samples."""
        return to_float32(fake, "fake")


def to_float32(samples: Any, name: str) -> torch.Tensor:
    """The samples cut off from their graph, in float32 or, where they are so already, in float64.

    Raises:
        TypeError: where they are no floating-point tensor.
        ValueError: where there is no sample.
    """
    if not isinstance(samples, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of samples, got {describe(samples)}")
    if not samples.is_floating_point():
        raise TypeError(f"{name} must be floating-point to have a gradient, got {samples.dtype}; convert it with .float()")
    if samples.dim() == 0 or samples.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one sample, batch first, got {describe(samples)}")
    return detach_to_float32(samples)


def between(real: torch.Tensor, fake: torch.Tensor, alpha: torch.Tensor | None = None) -> torch.Tensor:
    """A point on the line from each fake sample to its real one.

    Raises:
        ValueError: where shapes don't match.
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
    norms: torch.Tensor = torch.linalg.vector_norm(gradients, dim=1)  # its gradient at zero is zero; that of a root is NaN
    excess = norms - center
    return (excess.clamp_min(0) if one_sided else excess).square().mean()


def input_gradients(critic: Any, points: torch.Tensor, args: tuple[Any, ...] = ()) -> torch.Tensor:
    """The gradient of each sample's score with respect to the sample, differentiable, of shape (batch, elements).

    Args:
        critic: called as ``critic(points, *args)``.
        points: where the gradient is taken, without a graph.
        args: what else the critic takes.

    Raises:
        TypeError: where the critic can't be called or gives no tensor.
        ValueError: where it doesn't give one number per sample, or they don't depend on the input.
        RuntimeError: under ``no_grad``.
    """
    if not callable(critic):
        raise TypeError(f"critic must be callable, got {critic!r}")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "a gradient penalty was called under no_grad() or inference_mode(): it needs a graph to train the critic"
        )
    look_at(critic)
    if type(critic).__name__ == "OptimizedModule":
        critic = critic._orig_mod  # torch.compile's backward can't be differentiated again
    points = (points.clone() if points.is_inference() else points.detach()).requires_grad_()
    if args:
        args = map_tensors(detach_to_float32, args)
    device = "cpu" if points.is_cpu else points.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            gradients = differentiate(critic, points, args)
    else:
        gradients = differentiate(critic, points, args)
    if gradients is None:
        raise ValueError(f"the scores of the critic {name_of(critic)} don't depend on its input, or were detached from it")
    return gradients if gradients.dim() == 2 else gradients.reshape(points.shape[0], -1)


def differentiate(critic: Any, points: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor | None:
    """The gradient of the sum of the scores, which is each sample's own; ``None`` where they don't depend on the points."""
    scores = critic(points, *args)
    if not one_each(scores, points.shape[0]):
        raise bad_scores(scores, points.shape[0], f"the critic {name_of(critic)}")
    if not scores.requires_grad:
        return None
    found: torch.Tensor | None = torch.autograd.grad(scores.sum(), points, create_graph=True, allow_unused=True)[0]
    return found


def detach_to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its graph, and in float32 where autocast has made it shorter."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.float() if tensor.dtype in HALF else tensor


def one_each(scores: Any, samples: int) -> bool:
    """Whether there is one number per sample."""
    if not isinstance(scores, torch.Tensor) or scores.numel() != samples:
        return False
    return scores.dim() == 0 or scores.shape[0] == samples


def bad_scores(scores: Any, samples: int, source: str, where: str = "") -> Exception:
    """What to say of scores that aren't one number per sample."""
    if not isinstance(scores, torch.Tensor):
        return TypeError(f"{source} must give a tensor of scores, got {describe(scores)}{where}")
    return ValueError(
        f"{source} must give one number per sample, {samples} in all, got {describe(scores)}{where}; average each sample's "
        "numbers first, for example scores.flatten(1).mean(1)"
    )


_looked_at: WeakSet[nn.Module] = WeakSet()


def look_at(critic: Any) -> None:
    """Looks once at each critic whose gradient is to be penalised, and warns where BatchNorm makes it meaningless.

    Raises:
        ValueError: where FSDP2 has split it.
    """
    if not isinstance(critic, nn.Module) or critic in _looked_at:
        return
    if is_sharded(critic):
        raise ValueError(
            f"penalty: the critic {name_of(critic)} is under fully_shard, which lets go of its weights after each pass: the "
            "gradient of a gradient fails there, or is wrong. Wrap the critic in DistributedDataParallel instead; the "
            "generator may stay under fully_shard"
        )
    _looked_at.add(critic)
    names = [name or "itself" for name, part in critic.named_modules() if isinstance(part, _BatchNorm) and part.training]
    if names:
        warnings.warn(
            f"the critic {type(critic).__name__} has BatchNorm ({', '.join(names[:5])}) and a gradient penalty: "
            "BatchNorm makes each score depend on the whole batch, so no sample has a gradient of its own, and its running "
            "statistics move with the penalty's points; use LayerNorm, InstanceNorm or GroupNorm there",
            UserWarning,
            stacklevel=3,
        )


def check_number(value: Any, argument: str, owner: str) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{argument} of {owner} must be a finite number of at least 0, got {value!r}")
