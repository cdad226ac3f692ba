"""`create_gan_trainer`, compared with a loop written by hand: bit for bit over a hundred iterations."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import nn

from camshaft import Events, GradientPenalty, LRHistory, StepEvents, Trainer, create_gan_trainer
from camshaft.handlers import ExponentialMovingAverage, GradientClipping

LATENT, SAMPLES, ITERATIONS = 3, 6, 100


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(LATENT, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    return generator, critic


def batches() -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(SAMPLES, 2, generator=source) for _ in range(20)]


def adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.9))


def train_gan(**settings: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    generator, critic = networks()
    trainer = create_gan_trainer(generator, critic, adam(generator), adam(critic), latent=LATENT, **settings)
    outputs: list[dict[str, Any]] = []
    torch.manual_seed(2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    trainer.run(batches(), max_epochs=ITERATIONS // 20)
    return trainer, outputs


def penalty_by_hand(critic: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    alpha = torch.rand(len(real), 1)
    points = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return 10.0 * ((gradient.norm(2, dim=1) - 1) ** 2).mean()


def wgan_gp_by_hand(k: int, window: int = 1, max_norm: float | None = None) -> tuple[list[nn.Module], list[dict[str, Any]]]:
    """A loop written by hand. Returns both networks and the losses of each iteration."""
    generator, critic = networks()
    g_optimizer, c_optimizer = adam(generator), adam(critic)
    torch.manual_seed(2)
    outputs, steps, g_loss = [], 0, None
    for iteration, real in enumerate(islice(cycle(batches()), ITERATIONS), start=1):
        fake = generator(torch.randn(SAMPLES, LATENT)).detach()
        real_scores, fake_scores = critic(real), critic(fake)
        c_loss = fake_scores.mean() - real_scores.mean()
        penalty = penalty_by_hand(critic, real, fake)
        ((c_loss + penalty) / window).backward()
        if iteration % window == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(critic.parameters(), max_norm)
            c_optimizer.step()
            c_optimizer.zero_grad()
            steps += 1
            if steps % k == 0:
                critic.requires_grad_(False)
                for _ in range(window):
                    g_loss = -critic(generator(torch.randn(SAMPLES, LATENT))).mean()
                    (g_loss / window).backward()
                critic.requires_grad_(True)
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(generator.parameters(), max_norm)
                g_optimizer.step()
                g_optimizer.zero_grad()
        outputs.append({"discriminator_loss": c_loss, "penalty": penalty, "generator_loss": g_loss})
    return [generator, critic], outputs


def assert_same_bits(networks: list[nn.Module], trainer: Trainer) -> None:
    trained = [trainer.phases["generator"].module, trainer.phases["discriminator"].module]
    for by_hand, own in zip(networks, trained, strict=True):
        for (name, expected), found in zip(by_hand.state_dict().items(), own.state_dict().values(), strict=True):
            assert torch.equal(expected, found), name


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("window", "max_norm"), [(1, None), (1, 0.5), (4, None), (4, 0.5)])
def test_wgan_gp_equals_a_loop_written_by_hand(k: int, window: int, max_norm: float | None) -> None:
    expected, _ = wgan_gp_by_hand(k, window, max_norm)
    trainer, _ = train_gan(penalty=GradientPenalty(), discriminator_steps=k, accumulation_steps=window, clip_grad_norm=max_norm)
    assert trainer.phases["generator"].optimizer_step == ITERATIONS // window // k
    assert_same_bits(expected, trainer)


@pytest.mark.parametrize(("k", "window"), [(1, 1), (5, 1), (5, 4)])
def test_the_output_equals_that_of_a_loop_written_by_hand(k: int, window: int) -> None:
    _, expected = wgan_gp_by_hand(k, window)
    _, outputs = train_gan(penalty=GradientPenalty(), discriminator_steps=k, accumulation_steps=window)
    assert len(outputs) == len(expected)
    for own, by_hand in zip(outputs, expected, strict=True):
        for name, value in by_hand.items():
            assert own[name] is None if value is None else torch.equal(own[name], value), name
            assert own[name] is None or not own[name].requires_grad


def test_clipping_one_network_does_not_affect_the_other() -> None:
    generator, critic = networks()
    g_optimizer, c_optimizer = (torch.optim.SGD(network.parameters(), lr=0.1) for network in (generator, critic))
    trainer = create_gan_trainer(generator, critic, g_optimizer, c_optimizer, latent=LATENT)
    GradientClipping(1e-6, phase="generator").attach(trainer)
    before = [network[0].weight.clone() for network in (generator, critic)]
    torch.manual_seed(2)
    trainer.run(batches())
    moved = [(network[0].weight.detach() - w).abs().max() for network, w in zip((generator, critic), before, strict=True)]
    assert moved[0] <= 20 * 0.1 * 1e-6
    assert moved[1] > 1e-3


def test_schedules_follow_the_steps_of_their_own_network() -> None:
    generator, critic = networks()
    optimizers = g_optimizer, c_optimizer = adam(generator), adam(critic)
    halving, tenth = (torch.optim.lr_scheduler.StepLR(o, 2, gamma) for o, gamma in zip(optimizers, (0.5, 0.1), strict=True))
    trainer = create_gan_trainer(
        generator,
        critic,
        g_optimizer,
        c_optimizer,
        latent=LATENT,
        discriminator_steps=5,
        generator_scheduler=halving,
        discriminator_scheduler=tenth,
    )
    history = LRHistory().attach(trainer)
    trainer.run(batches())
    expected = {"discriminator/lr": [2e-3 * 0.1 ** (step // 2) for step in range(20)], "generator/lr": [2e-3, 2e-3, 1e-3, 1e-3]}
    assert {name: [rate for _, rate in points] for name, points in history.history.items()} == {
        name: pytest.approx(rates) for name, rates in expected.items()
    }


def test_the_average_of_the_generator_equals_one_computed_by_hand() -> None:
    generator, critic = networks()
    trainer = create_gan_trainer(generator, critic, adam(generator), adam(critic), latent=LATENT, discriminator_steps=3)
    ema = ExponentialMovingAverage(0.9).attach(trainer)
    expected: list[torch.Tensor] = []

    @trainer.on(StepEvents.OPTIMIZER_STEP_COMPLETED(phase="generator"))
    def average() -> None:
        weight = generator[0].weight.detach()
        expected.append(weight.clone() if not expected else 0.9 * expected[-1] + 0.1 * weight)

    trainer.run(batches(), max_epochs=3)
    assert len(expected) == 20
    torch.testing.assert_close(ema.module[0].weight, expected[-1], rtol=1e-6, atol=1e-7)
