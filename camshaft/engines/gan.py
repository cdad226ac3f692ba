"""``create_gan_trainer``: two networks that play against each other become a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from camshaft.batches import describe, to_device
from camshaft.engines.checks import bad_loss, check_count, name_of
from camshaft.engines.gan_losses import loss_pair
from camshaft.engines.penalties import HALF, Penalty, bad_scores, one_each, warn_of_batch_norm
from camshaft.engines.phase import Phase
from camshaft.engines.trainer import Trainer
from camshaft.handlers import GradientAccumulation, GradientClipping, LRScheduling, MixedPrecision

__all__ = ["create_gan_trainer"]


def prepare_real(batch: Any, device: torch.device | str | None = None, non_blocking: bool = False) -> tuple[Any, Any]:
    """The default ``prepare_batch`` of a GAN: takes ``x``, ``[x]`` or ``(x, y)`` and moves it to the device.

    Args:
        batch: the real samples, alone or with their conditions.
        device: where to.
        non_blocking: lets a copy from pinned memory run beside the host.

    Returns:
        ``(x, y)`` on the device; ``y`` is ``None`` where the batch has none.

    Raises:
        TypeError: where the batch is anything else.
    """
    if isinstance(batch, torch.Tensor):  # the usual cases, on the hot path
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

    One iteration takes one batch of real samples, and without accumulation makes one discriminator step with it. Every
    ``discriminator_steps``-th completed step of the discriminator is followed by a whole window of the generator, with
    latents of its own; the count runs on over epochs. While one network steps no gradient is made for the other.

    Both are phases of the trainer, ``"discriminator"`` and ``"generator"``: the same step, events and handlers as in
    supervised training, for each network in turn. Arguments set both networks alike; a handler with ``phase=`` sets one, for
    example ``GradientClipping(1.0, phase="generator").attach(trainer)``.

    In a step's events ``state.x`` is the real batch, ``state.y`` its conditions and ``state.y_pred`` the generated batch. The
    output of an iteration is a mapping of detached tensors: ``discriminator_loss`` (without the penalty), ``penalty``
    (weighted; 0 where it wasn't applied) and ``generator_loss`` (the latest; ``None`` before the first).

    Nothing looks at the losses: where one may not be finite, ``NonFiniteGuard().attach(trainer)`` refuses the step, and its
    error names the network and the iteration.

    Args:
        generator: called as ``generator(latents)``, gives samples of the real data's shape.
        discriminator: called as ``discriminator(samples)``, gives one number per sample, a logit or a score.
        generator_optimizer: the generator's optimizer, or several that step together.
        discriminator_optimizer: the discriminator's.
        latent: the latents' size: a number for normal latents of shape ``(batch, latent)``, a sequence of numbers for
            ``(batch, *latent)``; or a callable ``(n, device) -> tensor`` with ``n`` samples first.
        loss: ``"wgan"``, ``"hinge"``, ``"non_saturating"``, ``"least_squares"``, or a pair of callables
            ``(discriminator_loss(real_scores, fake_scores), generator_loss(fake_scores))``.
        penalty: one or several of ``GradientPenalty``, ``DRAGAN``, ``R1`` and ``R2``, or any callable
            ``(critic, real, fake, *conditions) -> scalar``, with an attribute ``every`` where it is to be lazy.
        discriminator_steps: how many discriminator steps come before each generator step.
        conditional: batches are ``(x, y)``, and both networks are called with ``y`` as a second argument.
        device: where batches are moved to; by default where the discriminator's parameters are.
        non_blocking: lets copies from pinned memory run beside the host.
        amp: ``None``, ``"bf16"``, ``"fp16"`` (with a gradient scaler for each network) or the ``torch.dtype``; penalties
            stay in float32.
        accumulation_steps: how many batches make one optimizer step: of the data for the discriminator, of fresh latents
            for the generator.
        loss_weight: how batches count in a window: ``"batch"``, ``"samples"`` or a function of the batch.
        partial_window: what becomes of an epoch's last, shorter window: ``"step"`` or ``"drop"``.
        clip_grad_norm: the largest total 2-norm of each network's gradient.
        clip_grad_value: the largest absolute value of a gradient's entry.
        generator_scheduler: any ``torch.optim.lr_scheduler`` of the generator's optimizer, or a sequence of them.
        discriminator_scheduler: the discriminator's.
        schedule_every: ``"step"`` (each step of the scheduler's own network) or ``"epoch"``.
        prepare_batch: called as ``prepare_batch(batch, device=..., non_blocking=...)``, gives ``x`` or ``(x, y)``.

    Returns:
        The trainer.

    Raises:
        TypeError: where an argument is of the wrong kind.
        ValueError: where a value isn't allowed, or networks, optimizers and schedulers don't belong together.
        RuntimeError: where the device can't do what ``amp`` asks for.

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
    if not callable(prepare_batch):
        raise TypeError(f"prepare_batch must be callable, got {prepare_batch!r}")
    discriminator_loss, generator_loss = loss_pair(loss)
    penalties = penalties_of(penalty)
    players = Players(generator, discriminator, latent, conditional, prepare_batch, non_blocking)
    judging = Judging(players, discriminator_loss, penalties, loss)
    forging = Forging(players, generator_loss, loss)
    lead = Phase("discriminator", discriminator, discriminator_optimizer, judging, prepare=judging.prepare, device=device)
    follower = Phase(
        "generator",
        generator,
        generator_optimizer,
        forging,
        interval=discriminator_steps,
        frozen=(discriminator,),
        prepare=forging.prepare,
        device=device,
    )
    if lead.device != follower.device:
        raise ValueError(
            f"the generator is on {str(follower.device)!r} and the discriminator on {str(lead.device)!r}; move both to one "
            "device before you make their optimizers"
        )
    players.device = judging.device = lead.device
    players.phases = lead, follower
    trainer = Trainer([lead, follower], output=output)
    if any(isinstance(item, Penalty) for item in penalties):
        warn_of_batch_norm(discriminator)

    if amp is not None:
        MixedPrecision(amp).attach(trainer)
    check_count(accumulation_steps, "accumulation_steps")
    if (accumulation_steps, loss_weight, partial_window) != (1, "batch", "step"):
        GradientAccumulation(accumulation_steps, loss_weight=loss_weight, partial_window=partial_window).attach(trainer)
    if clip_grad_norm is not None or clip_grad_value is not None:
        GradientClipping(clip_grad_norm, clip_value=clip_grad_value).attach(trainer)
    for name, scheduler in (("generator", generator_scheduler), ("discriminator", discriminator_scheduler)):
        attach_schedulers(trainer, name, scheduler, schedule_every)
    return trainer


class Players:
    """The two networks and what both turns share: the real batch on its device, samples and scores, each looked at."""

    device: torch.device
    phases: tuple[Phase, Phase]

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent: Any,
        conditional: bool,
        prepare_batch: Callable[..., Any],
        non_blocking: bool,
    ) -> None:
        self.generator, self.discriminator, self.conditional = generator, discriminator, conditional
        self.prepare_batch, self.non_blocking = prepare_batch, non_blocking
        self.latent = latents_from(latent, generator)

    def receive(self, engine: Any, batch: Any) -> None:
        """Puts the real batch on the device, as ``state.x`` and ``state.y``."""
        state = engine.state
        prepared = self.prepare_batch(batch, device=self.device, non_blocking=self.non_blocking)
        x, state.y = prepared if type(prepared) in (tuple, list) and len(prepared) == 2 else (prepared, None)
        state.x = x
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            raise TypeError(
                f"prepare_batch ({name_of(self.prepare_batch)}) must give the real samples as a tensor x, or (x, y), got "
                f"{describe(prepared)}{where(engine)}"
            )
        if self.conditional and state.y is None:
            raise TypeError(f"conditional=True needs batches (x, y), got {describe(batch)}{where(engine)}")

    def train(self) -> None:
        """Both networks take part in both turns: a handler may have left either in eval mode."""
        if not self.generator.training:
            self.phases[1].restore_modes()
        if not self.discriminator.training:
            self.phases[0].restore_modes()

    def samples(self, engine: Any) -> torch.Tensor:
        """As many generated samples as the batch has real ones."""
        state = engine.state
        shape = state.x.shape
        size = shape[0]
        latents = self.latent(size, self.device)
        if not isinstance(latents, torch.Tensor) or latents.dim() == 0 or latents.shape[0] != size:
            raise ValueError(
                f"latent ({name_of(self.latent)}) must give the generator a tensor with n={size} samples first, got "
                f"{describe(latents)}{where(engine)}"
            )
        fake = self.generator(latents, state.y) if self.conditional else self.generator(latents)
        if not isinstance(fake, torch.Tensor) or fake.shape != shape:
            raise ValueError(
                f"the generator {name_of(self.generator)} must give samples of the real data's shape {tuple(shape)}, "
                f"got {describe(fake)}{where(engine)}"
            )
        return fake

    def scores(self, engine: Any, samples: torch.Tensor) -> torch.Tensor:
        """One number per sample, in float32 at least, for a mean in half precision is too coarse a loss."""
        scores = self.discriminator(samples, engine.state.y) if self.conditional else self.discriminator(samples)
        if not one_each(scores, samples.shape[0]):
            raise bad_scores(scores, samples.shape[0], f"the discriminator {name_of(self.discriminator)}", where(engine))
        exact: torch.Tensor = scores.float() if scores.dtype in HALF else scores
        return exact


class Judging:
    """The discriminator's objective: its loss of real and generated samples, and the penalties that are due."""

    def __init__(self, players: Players, loss: Callable[..., Any], penalties: tuple[Any, ...], named: Any) -> None:
        self.players, self.loss = players, loss
        self.penalties = tuple((penalty, penalty_interval(penalty)) for penalty in penalties)
        self.described = describe_loss(named, loss)
        self.device = torch.device("cpu")
        self._none: torch.Tensor | None = None

    def prepare(self, engine: Any, batch: Any) -> None:
        self.players.receive(engine, batch)
        self.players.train()

    def __call__(self, engine: Any, _: Any) -> torch.Tensor:
        state, players = engine.state, self.players
        with torch.no_grad():
            fake = players.samples(engine)
        state.y_pred = fake
        loss: torch.Tensor = self.loss(players.scores(engine, state.x), players.scores(engine, fake))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise bad_loss(loss, f"the loss of the discriminator (from {self.described}){where(engine)}")
        losses = state.losses  # noted here and not by the step, which would take three times as long over it
        losses["discriminator_loss"] = loss.detach()
        penalty = self.penalty(engine, fake) if self.penalties else None
        if penalty is None:
            losses["penalty"] = self.no_penalty()
            return loss
        losses["penalty"] = penalty.detach()
        return loss + penalty

    def penalty(self, engine: Any, fake: torch.Tensor) -> torch.Tensor | None:
        """The sum of the penalties that are due in the discriminator's coming step; ``None`` where none is."""
        state, players = engine.state, self.players
        total: torch.Tensor | None = None
        step = engine.lead.optimizer_step + 1
        conditions = (state.y,) if players.conditional else ()
        for penalty, every in self.penalties:
            if step % every == 0:
                value: torch.Tensor = penalty(players.discriminator, state.x, fake, *conditions)
                if not isinstance(value, torch.Tensor) or value.numel() != 1:
                    raise bad_loss(value, f"the penalty {name_of(penalty)}{where(engine)}")
                total = value if total is None else total + value
        return total

    def no_penalty(self) -> torch.Tensor:
        """A zero on the device, made once."""
        if self._none is None:
            self._none = torch.zeros((), device=self.device)
        return self._none


class Forging:
    """The generator's objective: that its samples pass for real ones."""

    def __init__(self, players: Players, loss: Callable[..., Any], named: Any) -> None:
        self.players, self.loss = players, loss
        self.described = describe_loss(named, loss)

    def prepare(self, engine: Any, batch: Any) -> None:
        if engine.state.x is None:  # the data ended inside a window that a resumed run has not gathered itself
            self.players.receive(engine, batch)
        self.players.train()

    def __call__(self, engine: Any, _: Any) -> torch.Tensor:
        state, players = engine.state, self.players
        state.y_pred = fake = players.samples(engine)
        loss: torch.Tensor = self.loss(players.scores(engine, fake))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise bad_loss(loss, f"the loss of the generator (from {self.described}){where(engine)}")
        state.losses["generator_loss"] = loss.detach()
        return loss


def output(engine: Trainer) -> dict[str, Any]:
    """What an iteration gives: the losses, detached."""
    losses = engine.state.losses
    return {
        "discriminator_loss": losses["discriminator_loss"],
        "penalty": losses["penalty"],
        "generator_loss": losses.get("generator_loss"),
    }


def where(engine: Any) -> str:
    """The place in the run, for an error message."""
    return f" in iteration {engine.state.iteration}, in the turn of the {engine.state.phase}"


def describe_loss(named: Any, loss: Callable[..., Any]) -> str:
    return f"loss {named!r}" if isinstance(named, str) else f"loss {name_of(loss)}"


def latents_from(latent: Any, generator: nn.Module) -> Callable[[int, torch.device], Any]:
    """A source of latents: the user's own, or normal ones of a size, in the generator's precision."""
    if callable(latent):
        return latent  # type: ignore[no-any-return]
    sizes = tuple(latent) if isinstance(latent, (tuple, list)) else (latent,)
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(
            f"latent must be a positive integer, a sequence of them, or a callable (n, device) -> tensor, got {latent!r}"
        )
    dtypes = [p.dtype for p in generator.parameters() if p.is_floating_point()] if isinstance(generator, nn.Module) else []
    dtype = dtypes[0] if dtypes else None

    def normal(n: int, device: torch.device) -> torch.Tensor:
        return torch.randn(n, *sizes, device=device, dtype=dtype)

    return normal


def penalties_of(penalty: Any) -> tuple[Any, ...]:
    """The penalties as a tuple.

    Raises:
        TypeError: where one can't be called, or is a class where an object is wanted.
    """
    penalties = tuple(penalty) if isinstance(penalty, (tuple, list)) else () if penalty is None else (penalty,)
    for item in penalties:
        if isinstance(item, type):
            raise TypeError(f"penalty must be an object, not the class {item.__name__}; write {item.__name__}()")
        if not callable(item):
            raise TypeError(f"penalty must be GradientPenalty(), DRAGAN(), R1(), R2(), a callable or a sequence, got {item!r}")
        check_count(penalty_interval(item), f"every of {name_of(item)}")
    return penalties


def penalty_interval(penalty: Any) -> int:
    """On every how many-th discriminator step it is due."""
    return getattr(penalty, "every", 1)


def attach_schedulers(trainer: Trainer, phase: str, scheduler: Any, every: str) -> None:
    """Attaches a network's schedulers.

    Raises:
        ValueError: where one was made for the other network's optimizer.
    """
    schedulers = () if scheduler is None else scheduler if isinstance(scheduler, (list, tuple)) else (scheduler,)
    for number, item in enumerate(schedulers, start=1):
        handler = LRScheduling(item, every=every).attach(
            trainer, f"LRScheduling/{phase}" + (f"/{number}" if number > 1 else "")
        )
        if handler.phase != phase:
            raise ValueError(
                f"{phase}_scheduler ({type(item).__name__}) was made for the {handler.phase}'s optimizer; make it from "
                f"{phase}_optimizer"
            )
