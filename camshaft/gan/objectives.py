"""The objectives of a GAN's two phases: the discriminator's and the generator's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from camshaft.gan.input_gradients import HALF, bad_scores, has_one_score_per_sample
from camshaft.objective import Objective
from camshaft.pytree import describe
from camshaft.validation import as_integer, bad_loss, name_of

__all__ = ["DiscriminatorObjective", "GANState", "GeneratorObjective", "penalty_interval"]


class GANState:
    """The two networks, and what both objectives share: the real batch, generated samples and scores, each validated."""

    device: torch.device

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
        """Moves the real batch to the device, as ``state.x`` and ``state.y``."""
        state = engine.state
        prepared = self.prepare_batch(batch, device=self.device, non_blocking=self.non_blocking)
        x, state.y = prepared if type(prepared) in (tuple, list) and len(prepared) == 2 else (prepared, None)
        state.x = x
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            raise TypeError(
                f"prepare_batch ({name_of(self.prepare_batch)}) must return the real samples as a tensor x, or (x, y), got "
                f"{describe(prepared)}{location(engine)}"
            )
        if self.conditional and state.y is None:
            raise TypeError(f"conditional=True needs batches (x, y), got {describe(batch)}{location(engine)}")

    def train(self, engine: Any) -> None:
        """Puts both networks in training mode: both take part in both turns."""
        for phase in engine.phases.values():
            if not phase.module.training:
                phase.restore_modes()

    def samples(self, engine: Any) -> torch.Tensor:
        """Generates as many samples as the batch has real ones."""
        state = engine.state
        shape = state.x.shape
        size = shape[0]
        latents = self.latent(size, self.device)
        if not isinstance(latents, torch.Tensor) or latents.dim() == 0 or latents.shape[0] != size:
            raise ValueError(
                f"latent ({name_of(self.latent)}) must return a tensor with n={size} samples first, got "
                f"{describe(latents)}{location(engine)}"
            )
        fake = self.generator(latents, state.y) if self.conditional else self.generator(latents)
        if not isinstance(fake, torch.Tensor) or fake.shape != shape:
            raise ValueError(
                f"the generator {name_of(self.generator)} must return samples of the real data's shape {tuple(shape)}, "
                f"got {describe(fake)}{location(engine)}"
            )
        return fake

    def scores(self, engine: Any, samples: torch.Tensor) -> torch.Tensor:
        """The scores of samples, one per sample, in float32 at least: a mean in half precision is too coarse for a loss."""
        scores = self.discriminator(samples, engine.state.y) if self.conditional else self.discriminator(samples)
        if not has_one_score_per_sample(scores, samples.shape[0]):
            raise bad_scores(scores, samples.shape[0], f"the discriminator {name_of(self.discriminator)}", location(engine))
        in_full_precision: torch.Tensor = scores.float() if scores.dtype in HALF else scores
        return in_full_precision


class DiscriminatorObjective(Objective):
    """The discriminator's objective: its loss of real and generated samples, and the penalties of this step."""

    def __init__(self, gan: GANState, loss: Callable[..., Any], penalties: tuple[Any, ...], loss_argument: Any) -> None:
        self.gan, self.loss = gan, loss
        self.penalties = tuple((penalty, penalty_interval(penalty)) for penalty in penalties)
        self.label = describe_loss(loss_argument, loss)
        self.device = torch.device("cpu")
        self._zero: torch.Tensor | None = None

    @property
    def non_blocking(self) -> bool:  # type: ignore[override]
        """Whether batches are copied with ``non_blocking``."""
        return self.gan.non_blocking

    @property
    def has_penalties(self) -> bool:  # type: ignore[override]
        """Whether the loss contains gradients of the discriminator."""
        return bool(self.penalties)

    def inputs(self, state: Any) -> list[Any]:
        """The real batch, with its conditions if the networks take any."""
        return [state.x, state.y] if self.gan.conditional else [state.x]

    def prepare(self, engine: Any, batch: Any) -> None:
        """Moves the real batch to the device."""
        self.gan.receive(engine, batch)
        self.gan.train(engine)

    def __call__(self, engine: Any, _: Any) -> torch.Tensor:
        state, gan = engine.state, self.gan
        with torch.no_grad():
            fake = gan.samples(engine)
        state.y_pred = fake
        loss: torch.Tensor = self.loss(gan.scores(engine, state.x), gan.scores(engine, fake))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise bad_loss(loss, f"the loss of the discriminator (from {self.label}){location(engine)}")
        losses = state.losses  # set here because a mapping of losses would take three times as long
        losses["discriminator_loss"] = loss.detach()
        penalty = self.penalty(engine, fake) if self.penalties else None
        if penalty is None:
            losses["penalty"] = self.no_penalty()
            return loss
        losses["penalty"] = penalty.detach()
        return loss + penalty

    def penalty(self, engine: Any, fake: torch.Tensor) -> torch.Tensor | None:
        """The sum of the penalties that apply in the discriminator's next step; ``None`` if none does."""
        state, gan = engine.state, self.gan
        total: torch.Tensor | None = None
        step = engine.primary.optimizer_step + 1
        conditions = (state.y,) if gan.conditional else ()
        for penalty, every in self.penalties:
            if step % every == 0:
                value: torch.Tensor = penalty(gan.discriminator, state.x, fake, *conditions)
                if not isinstance(value, torch.Tensor) or value.numel() != 1:
                    raise bad_loss(value, f"the penalty {name_of(penalty)}{location(engine)}")
                total = value if total is None else total + value
        return total

    def no_penalty(self) -> torch.Tensor:
        """A zero on the device, created once."""
        if self._zero is None:
            self._zero = torch.zeros((), device=self.device)
        return self._zero


class GeneratorObjective(Objective):
    """The generator's objective: its loss of the scores of generated samples."""

    def __init__(self, gan: GANState, loss: Callable[..., Any], loss_argument: Any) -> None:
        self.gan, self.loss = gan, loss
        self.label = describe_loss(loss_argument, loss)

    def prepare(self, engine: Any, batch: Any) -> None:
        """Uses the real batch of the discriminator's turn."""
        if engine.state.x is None:  # a resumed run whose data ended before its first batch
            self.gan.receive(engine, batch)
        self.gan.train(engine)

    def __call__(self, engine: Any, _: Any) -> torch.Tensor:
        state, gan = engine.state, self.gan
        state.y_pred = fake = gan.samples(engine)
        loss: torch.Tensor = self.loss(gan.scores(engine, fake))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise bad_loss(loss, f"the loss of the generator (from {self.label}){location(engine)}")
        state.losses["generator_loss"] = loss.detach()
        return loss


def location(engine: Any) -> str:
    """The iteration and the phase, for an error message."""
    return f" in iteration {engine.state.iteration}, in the turn of the {engine.state.phase}"


def describe_loss(argument: Any, loss: Callable[..., Any]) -> str:
    """The name of a loss in errors: as the user wrote it, or that of its function."""
    return f"loss {argument!r}" if isinstance(argument, str) else f"loss {name_of(loss)}"


def latents_from(latent: Any, generator: nn.Module) -> Callable[[int, torch.device], Any]:
    """The function that draws latents: the user's own, or one that draws normal latents in the generator's dtype."""
    if callable(latent):
        return latent  # type: ignore[no-any-return]
    sizes = [as_integer(size) or 0 for size in (latent if isinstance(latent, (tuple, list)) else (latent,))]
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"latent must be a positive integer, a sequence of them, or a callable (n, device) -> tensor, got {latent!r}"
        )
    dtypes = [p.dtype for p in generator.parameters() if p.is_floating_point()] if isinstance(generator, nn.Module) else []
    dtype = dtypes[0] if dtypes else None

    def normal(n: int, device: torch.device) -> torch.Tensor:
        return torch.randn(n, *sizes, device=device, dtype=dtype)

    return normal


def penalty_interval(penalty: Any) -> int:
    """The number of discriminator steps between two applications of a penalty."""
    return getattr(penalty, "every", 1)
