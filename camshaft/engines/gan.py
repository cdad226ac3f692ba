"""``create_gan_trainer``: makes a trainer of a generator and a discriminator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from camshaft.engines.phase import Phase
from camshaft.engines.shorthand import attach_schedulers, attach_settings
from camshaft.engines.trainer import Trainer
from camshaft.gan.input_gradients import check_critic
from camshaft.gan.losses import loss_pair
from camshaft.gan.objectives import DiscriminatorObjective, GANState, GeneratorObjective, penalty_interval
from camshaft.gan.penalties import Penalty
from camshaft.models import ddp_wrapper
from camshaft.pytree import describe, to_device
from camshaft.validation import check_count, check_prepare, name_of

__all__ = ["create_gan_trainer"]


def prepare_real(batch: Any, device: torch.device | str | None = None, non_blocking: bool = False) -> tuple[Any, Any]:
    """The default ``prepare_batch`` of a GAN: moves ``x``, ``[x]`` or ``(x, y)`` to the device.

    Args:
        batch: the real samples, alone or with their conditions.
        device: the target device.
        non_blocking: lets copies from pinned memory overlap with computation.

    Returns:
        ``(x, y)`` on the device; ``y`` is ``None`` if the batch has none.

    Raises:
        TypeError: if the batch is anything else.
    """
    if isinstance(batch, torch.Tensor):  # the most frequent case, on the hot path
        return batch if device is None or batch.device == device else batch.to(device, non_blocking=non_blocking), None
    if not isinstance(batch, (tuple, list)) or len(batch) not in (1, 2):
        raise TypeError(
            f"a batch must be a tensor x, [x] or (x, y), got {describe(batch)}; pass prepare_batch=, a function of "
            "(batch, device, non_blocking) that returns x or (x, y)"
        )
    y = to_device(batch[1], device, non_blocking) if len(batch) == 2 else None
    return to_device(batch[0], device, non_blocking), y


def create_gan_trainer(
    generator: nn.Module,
    discriminator: nn.Module,
    generator_optimizer: Optimizer | Sequence[Optimizer],
    discriminator_optimizer: Optimizer | Sequence[Optimizer],
    *,
    latent: int | Sequence[int] | Callable[[int, torch.device], torch.Tensor],
    loss: str | tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = "wgan",
    penalty: Any = None,
    discriminator_steps: int = 1,
    conditional: bool = False,
    device: torch.device | str | None = None,
    non_blocking: bool = True,
    amp: str | torch.dtype | None = None,
    accumulation_steps: int = 1,
    loss_weight: str | Callable[[Any], Any] = "batch",
    partial_window: str = "step",
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    generator_scheduler: Any = None,
    discriminator_scheduler: Any = None,
    schedule_every: str = "step",
    prepare_batch: Callable[..., Any] = prepare_real,
) -> Trainer:
    """Makes a trainer for a generative adversarial network.

    One iteration takes one batch of real samples and, without accumulation, makes one discriminator step. After every
    ``discriminator_steps``-th completed discriminator step the generator runs a full window, with latents of its own; the
    count continues over epochs. While one network trains, no gradient is computed for the other.

    Both are phases of the trainer, ``"discriminator"`` and ``"generator"``, with the same step, events and handlers as in
    supervised training. Arguments apply to both networks; a handler with ``phase=`` applies to one, for example
    ``GradientClipping(1.0, phase="generator").attach(trainer)``.

    In a step's events ``state.x`` is the real batch, ``state.y`` its conditions and ``state.y_pred`` the generated batch. The
    output of an iteration is a mapping of detached tensors: ``discriminator_loss`` (without the penalty), ``penalty``
    (weighted; 0 if it wasn't applied) and ``generator_loss`` (the latest; ``None`` before the first).

    The losses are not checked: attach ``NonFiniteGuard()`` to skip steps that are not finite, or to get an error that names
    the network and the iteration.

    Args:
        generator: called as ``generator(latents)``; returns samples of the real data's shape.
        discriminator: called as ``discriminator(samples)``; returns one number per sample, a logit or a score.
        generator_optimizer: the generator's optimizer, or several that step together.
        discriminator_optimizer: the discriminator's.
        latent: the size of normal latents: a number for the shape ``(batch, latent)``, a sequence for ``(batch, *latent)``; or
            a callable ``(n, device) -> tensor`` of shape ``(n, ...)``.
        loss: ``"wgan"``, ``"hinge"``, ``"non_saturating"``, ``"least_squares"``, or a pair of callables
            ``(discriminator_loss(real_scores, fake_scores), generator_loss(fake_scores))``.
        penalty: one or several of ``GradientPenalty``, ``DRAGAN``, ``R1`` and ``R2``, or any callable
            ``(critic, real, fake, *conditions) -> scalar``; its attribute ``every``, if any, is the interval in discriminator
            steps. Not for a discriminator under ``fully_shard``; wrap it in DDP.
        discriminator_steps: the number of discriminator steps before each generator step.
        conditional: batches are ``(x, y)``, and both networks are called with ``y`` as a second argument.
        device: the device of the batches; by default that of the discriminator's parameters.
        non_blocking: lets copies from pinned memory overlap with computation.
        amp: ``None``, ``"bf16"``, ``"fp16"`` (with a gradient scaler for each network) or the ``torch.dtype``; penalties
            stay in float32.
        accumulation_steps: the number of batches in one optimizer step: of data for the discriminator, of new latents for
            the generator.
        loss_weight: the weight of each batch in a window: ``"batch"``, ``"samples"`` or a function of the batch.
        partial_window: what to do with an epoch's last, shorter window: ``"step"`` or ``"drop"``.
        clip_grad_norm: the largest total 2-norm of each network's gradient.
        clip_grad_value: the largest absolute value of a gradient's entry.
        generator_scheduler: any ``torch.optim.lr_scheduler`` of the generator's optimizer, or a sequence of them.
        discriminator_scheduler: the discriminator's.
        schedule_every: ``"step"`` (each step of the scheduler's own network) or ``"epoch"``.
        prepare_batch: called as ``prepare_batch(batch, device=..., non_blocking=...)``; returns ``x`` or ``(x, y)``.

    Returns:
        The trainer.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a value is not allowed, or networks, optimizers and schedulers do not belong together.
        RuntimeError: if the device does not support ``amp``.

    Example:
        >>> from camshaft import GradientPenalty
        >>> generator, critic = nn.Linear(4, 2), nn.Linear(2, 1)
        >>> optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3) for network in (generator, critic)]
        >>> trainer = create_gan_trainer(
        ...     generator, critic, *optimizers, latent=4, penalty=GradientPenalty(), discriminator_steps=5
        ... )
        >>> state = trainer.run([torch.randn(8, 2)] * 10)
        >>> trainer.phases["discriminator"].optimizer_step, trainer.phases["generator"].optimizer_step
        (10, 2)
        >>> list(state.output)
        ['discriminator_loss', 'penalty', 'generator_loss']
    """
    check_count(discriminator_steps, "discriminator_steps")
    check_prepare(prepare_batch)
    discriminator_loss, generator_loss = loss_pair(loss)
    penalties = penalties_of(penalty)
    gan = GANState(without_ddp(generator), without_ddp(discriminator), latent, conditional, prepare_batch, non_blocking)
    discriminator_objective = DiscriminatorObjective(gan, discriminator_loss, penalties, loss)
    generator_objective = GeneratorObjective(gan, generator_loss, loss)
    primary = Phase(
        "discriminator",
        discriminator,
        discriminator_optimizer,
        discriminator_objective,
        prepare=discriminator_objective.prepare,
        device=device,
    )
    follower = Phase(
        "generator",
        generator,
        generator_optimizer,
        generator_objective,
        interval=discriminator_steps,
        frozen=(discriminator,),
        prepare=generator_objective.prepare,
        device=device,
    )
    if primary.device != follower.device:
        raise ValueError(
            f"the generator is on {str(follower.device)!r} and the discriminator on {str(primary.device)!r}; move both to one "
            "device before you make their optimizers"
        )
    gan.device = discriminator_objective.device = primary.device
    for phase in (primary, follower):
        phase.reduced_by_hand = ddp_wrapper(phase.module) is not None
    trainer = Trainer([primary, follower], output=output)
    if any(isinstance(item, Penalty) for item in penalties):
        check_critic(discriminator)

    attach_settings(
        trainer,
        amp=amp,
        accumulation_steps=accumulation_steps,
        loss_weight=loss_weight,
        partial_window=partial_window,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
    )
    attach_schedulers(trainer, generator_scheduler, schedule_every, phase="generator")
    attach_schedulers(trainer, discriminator_scheduler, schedule_every, phase="discriminator")
    return trainer


def without_ddp(network: Any) -> Any:
    """A network as the objectives call it: without DDP's wrapper, which allows only one forward pass before each backward."""
    wrapper = ddp_wrapper(network) if isinstance(network, nn.Module) else None
    return network if wrapper is None else wrapper.module


def output(engine: Trainer) -> dict[str, Any]:
    """The output of an iteration: the detached losses."""
    losses = engine.state.losses
    return {
        "discriminator_loss": losses["discriminator_loss"],
        "penalty": losses["penalty"],
        "generator_loss": losses.get("generator_loss"),
    }


def penalties_of(penalty: Any) -> tuple[Any, ...]:
    """The penalties as a tuple.

    Raises:
        TypeError: if one is not callable, or is a class instead of an object.
    """
    penalties = tuple(penalty) if isinstance(penalty, (tuple, list)) else () if penalty is None else (penalty,)
    for item in penalties:
        if isinstance(item, type):
            raise TypeError(f"penalty must be an object, not the class {item.__name__}; write {item.__name__}()")
        if not callable(item):
            raise TypeError(f"penalty must be GradientPenalty(), DRAGAN(), R1(), R2(), a callable or a sequence, got {item!r}")
        check_count(penalty_interval(item), f"every of {name_of(item)}")
    return penalties
