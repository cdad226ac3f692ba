"""The gradient of a critic's scores with respect to its input, and the checks of critics and samples."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from camshaft.models import is_compiled, is_sharded
from camshaft.pytree import describe, map_tensors
from camshaft.validation import name_of

__all__ = ["HALF", "bad_scores", "check_critic", "has_one_score_per_sample", "input_gradients", "to_float32"]

HALF = (torch.float16, torch.bfloat16)


def input_gradients(critic: Any, points: torch.Tensor, args: tuple[Any, ...] = ()) -> torch.Tensor:
    """The gradient of each sample's score with respect to the sample, differentiable, of shape (batch, elements).

    Args:
        critic: called as ``critic(points, *args)``.
        points: the points at which the gradient is computed, without a graph.
        args: further arguments of the critic.

    Raises:
        TypeError: if the critic can't be called or does not return a tensor.
        ValueError: if it does not return one number per sample, or they do not depend on the input.
        RuntimeError: under ``no_grad``.
    """
    if not callable(critic):
        raise TypeError(f"critic must be callable, got {critic!r}")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "a gradient penalty was called under no_grad() or inference_mode(): it needs a graph to train the critic"
        )
    if type(critic).__name__ == "OptimizedModule":
        critic = critic._orig_mod  # the backward pass of a compiled network can't be differentiated again
    check_critic(critic)
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
    """The gradient of the sum of the scores, that of each sample's own score; ``None`` if they do not depend on the points."""
    eager = isinstance(critic, nn.Module) and critic in _compiled
    scores = call_eagerly(critic, points, args) if eager else critic(points, *args)
    if not has_one_score_per_sample(scores, points.shape[0]):
        raise bad_scores(scores, points.shape[0], f"the critic {name_of(critic)}")
    if not scores.requires_grad:
        return None
    found: torch.Tensor | None = torch.autograd.grad(scores.sum(), points, create_graph=True, allow_unused=True)[0]
    return found


def call_eagerly(critic: nn.Module, points: torch.Tensor, args: tuple[Any, ...]) -> Any:
    """Calls a critic as if none of its parts were compiled, so that the gradient can be differentiated again."""
    with torch.compiler.set_stance("force_eager"):
        return critic(points, *args)


def to_float32(samples: Any, name: str) -> torch.Tensor:
    """Detached samples in float32, or in float64 if they are in float64.

    Raises:
        TypeError: if they are not a floating-point tensor.
        ValueError: if there is no sample.
    """
    if not isinstance(samples, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of samples, got {describe(samples)}")
    if not samples.is_floating_point():
        raise TypeError(f"{name} must be floating-point to have a gradient, got {samples.dtype}; convert it with .float()")
    if samples.dim() == 0 or samples.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one sample, batch first, got {describe(samples)}")
    return detach_to_float32(samples)


def detach_to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A detached tensor, in float32 if it was in half precision."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.float() if tensor.dtype in HALF else tensor


def has_one_score_per_sample(scores: Any, samples: int) -> bool:
    """Whether scores are one number per sample."""
    if not isinstance(scores, torch.Tensor) or scores.numel() != samples:
        return False
    return scores.dim() == 0 or scores.shape[0] == samples


def bad_scores(scores: Any, samples: int, source: str, where: str = "") -> Exception:
    """The error for scores that are not one number per sample."""
    if not isinstance(scores, torch.Tensor):
        return TypeError(f"{source} must return a tensor of scores, got {describe(scores)}{where}")
    return ValueError(
        f"{source} must return one number per sample, {samples} in all, got {describe(scores)}{where}; average each sample's "
        "numbers first, for example scores.flatten(1).mean(1)"
    )


_checked: WeakSet[nn.Module] = WeakSet()
_compiled: WeakSet[Any] = WeakSet()
"""Those of the checked critics that have a compiled part."""


def check_critic(critic: Any) -> None:
    """Checks each critic with a gradient penalty once, and warns if BatchNorm makes the penalty meaningless.

    Raises:
        ValueError: if FSDP2 has sharded it.
    """
    if not isinstance(critic, nn.Module) or critic in _checked:
        return
    if is_sharded(critic):
        raise ValueError(
            f"penalty: the critic {name_of(critic)} is under fully_shard, which frees its weights after each pass: the "
            "second derivative fails there, or is wrong. Wrap the critic in DistributedDataParallel instead; the "
            "generator may stay under fully_shard"
        )
    _checked.add(critic)
    if is_compiled(critic):
        _compiled.add(critic)
    names = [name or "itself" for name, part in critic.named_modules() if isinstance(part, _BatchNorm) and part.training]
    if names:
        warnings.warn(
            f"the critic {type(critic).__name__} has BatchNorm ({', '.join(names[:5])}) and a gradient penalty: "
            "BatchNorm makes each score depend on the whole batch, so that no sample has its own gradient, and the penalty's "
            "points change its running statistics; use LayerNorm, InstanceNorm or GroupNorm instead",
            UserWarning,
            stacklevel=3,
        )
