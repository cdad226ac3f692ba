"""Gradient penalties, compared with a float64 reference, central differences and a commonly copied implementation."""

from __future__ import annotations

import copy

import pytest
import torch
from critics import PENALTIES, Critic, samples
from torch import nn

from camshaft import DRAGAN, R1, R2, GradientPenalty, create_trainer, gradient_penalty

SHAPES = {1: (5,), 2: (5, 7), 3: (5, 3, 4), 4: (5, 3, 4, 2), 5: (5, 2, 3, 2, 2)}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def reference(critic: Critic, real: torch.Tensor, fake: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The penalty 10 * mean((norm - 1)**2) in float64, sample by sample, with the gradient of tanh written by hand."""
    first, last = critic.first.double(), critic.last.double()
    distances = []
    for r, f, a in zip(real.double(), fake.double(), alpha.double(), strict=True):
        point = (a * r + (1 - a) * f).reshape(-1)
        slope = 1 - torch.tanh(first.weight @ point + first.bias) ** 2
        gradient = (last.weight[0] * slope) @ first.weight
        distances.append((gradient.norm() - 1) ** 2)
    return 10 * torch.stack(distances).mean()


def parameter_gradients(loss: torch.Tensor, critic: nn.Module) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, critic.parameters(), strict=True)]


def assert_equals_reference(
    critic: Critic, real: torch.Tensor, fake: torch.Tensor, autocast: torch.dtype | None = None
) -> None:
    alpha, tolerance = torch.rand(len(real), dtype=real.dtype), TOLERANCE[real.dtype]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        own = gradient_penalty(critic, real, fake, alpha=alpha)
    gradients = parameter_gradients(own, critic)
    expected = reference(critic, real, fake, alpha)
    assert own.dtype == real.dtype
    torch.testing.assert_close(own.double(), expected, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(gradients, parameter_gradients(expected, critic), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("permuted", [False, True])
def test_the_value_and_parameter_gradients_equal_the_reference(rank, dtype, permuted):
    critic = Critic(SHAPES[rank], permuted).to(dtype)
    assert_equals_reference(critic, *samples(SHAPES[rank], dtype))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [2, 4])
def test_the_penalty_is_computed_in_float32_under_autocast(rank, autocast):
    assert_equals_reference(Critic(SHAPES[rank]), *samples(SHAPES[rank]), autocast)


def test_samples_may_have_any_memory_format():
    real, fake = samples(SHAPES[4])
    real = real.contiguous(memory_format=torch.channels_last)
    assert_equals_reference(Critic(SHAPES[4]), real, fake.transpose(2, 3).contiguous().transpose(2, 3))


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_parameter_gradients_equal_central_differences(penalty):
    critic, (real, fake) = Critic((5, 3, 4)).double(), samples((5, 3, 4), torch.float64)

    def value() -> torch.Tensor:
        torch.manual_seed(1)
        return penalty(critic, real, fake)

    analytic = parameter_gradients(value(), critic)[0]
    weight, step = critic.first.weight.data, 1e-5
    for index in [(0, 0), (2, 5), (5, 11)]:
        weight[index] += step
        above = value().item()
        weight[index] -= 2 * step
        below = value().item()
        weight[index] += step
        assert (above - below) / (2 * step) == pytest.approx(analytic[index].item(), rel=1e-6, abs=1e-8)


def linear_critic(*rows: float) -> nn.Linear:
    """A critic whose gradient is ``rows`` everywhere."""
    critic = nn.Linear(len(rows), 1, bias=False)
    critic.weight.data = torch.tensor([rows])
    return critic


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (GradientPenalty(), 10 * (5 - 1) ** 2),
        (GradientPenalty(weight=2.0, center=0.0), 2 * 5**2),
        (GradientPenalty(center=7.0, one_sided=True), 0),
        (GradientPenalty(center=2.0, one_sided=True), 10 * (5 - 2) ** 2),
        (GradientPenalty(every=4), 4 * 10 * (5 - 1) ** 2),
        (DRAGAN(weight=3.0), 3 * (5 - 1) ** 2),
        (R1(), 10 / 2 * 5**2),
        (R2(weight=4.0, every=3), 3 * 4 / 2 * 5**2),
    ],
    ids=repr,
)
def test_the_value_for_a_gradient_of_norm_five(penalty, expected):
    assert penalty(linear_critic(3.0, 4.0), *samples((6, 2))).item() == pytest.approx(expected, rel=1e-6)


class RecordingCritic(nn.Linear):
    """A critic that records its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.points = x.detach()
        return super().forward(x)


@pytest.mark.parametrize(("penalty", "expected"), [(R1(), 0), (R2(), 1)], ids=repr)
def test_r1_uses_real_samples_and_r2_generated_ones(penalty, expected):
    critic, pair = RecordingCritic(3, 1), samples((4, 3))
    penalty(critic, *pair)
    assert torch.equal(critic.points, pair[expected])


def test_points_are_interpolated_with_one_alpha_per_sample():
    critic, (real, fake) = RecordingCritic(3, 1), samples((50, 3))
    GradientPenalty()(critic, real, fake)
    shares = (critic.points - fake) / (real - fake)
    torch.testing.assert_close(shares, shares[:, :1].expand(-1, 3), rtol=1e-3, atol=1e-3)
    assert 0 <= shares.min() < 0.2
    assert 0.8 < shares.max() <= 1


def test_dragan_adds_noise_to_the_real_samples():
    critic, (real, fake) = RecordingCritic(30, 1), samples((200, 30))
    DRAGAN(std=0.25)(critic, real, fake)
    noise = critic.points - real
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(0.25, rel=0.05)


def test_alpha_is_the_weight_of_the_real_sample():
    critic, (real, fake) = RecordingCritic(3, 1), samples((2, 3))
    gradient_penalty(critic, real, fake, alpha=torch.tensor([1.0, 0.0]))
    assert torch.equal(critic.points, torch.stack([real[0], fake[1]]))


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_the_penalty_is_finite_for_a_zero_gradient(penalty):
    critic = Critic((4, 3))
    nn.init.zeros_(critic.last.weight)
    value = penalty(critic, *samples((4, 3)))
    value.backward()
    assert value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_only_the_critic_gets_gradients(penalty):
    generator, critic = nn.Linear(2, 3), Critic((4, 3))
    real = torch.randn(4, 3, requires_grad=True)
    penalty(critic, real, generator(torch.randn(4, 2))).backward()
    assert generator.weight.grad is None
    assert real.grad is None
    assert critic.first.weight.grad.abs().max() > 0


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_conditions_are_detached(penalty):
    critic, scale = linear_critic(3.0, 4.0), torch.tensor([2.0], requires_grad=True)
    pair = samples((6, 2))

    def conditional(x, scale):
        return critic(x) * scale

    penalty(conditional, *pair, scale).backward()
    doubled = penalty(conditional, *pair, scale.detach()).item()
    assert doubled == pytest.approx(penalty(linear_critic(6.0, 8.0), *pair).item(), rel=1e-6)
    assert scale.grad is None


def test_half_precision_samples_are_converted_to_float32():
    critic, (real, fake) = Critic((4, 3)), samples((4, 3))
    alpha = torch.rand(4)
    own = gradient_penalty(critic, real.bfloat16(), fake.half(), alpha=alpha)
    assert own.dtype == torch.float32
    assert own.item() == gradient_penalty(critic, real.bfloat16().float(), fake.half().float(), alpha=alpha).item()


def test_samples_may_be_made_in_inference_mode():
    with torch.inference_mode():
        real, fake = samples((4, 3))
    for penalty in PENALTIES:
        assert penalty(Critic((4, 3)), real, fake).requires_grad


def test_a_compiled_critic_can_be_differentiated_twice():
    critic, pair, alpha = Critic((4, 3)), samples((4, 3)), torch.rand(4)
    compiled = torch.compile(critic, backend="eager")
    assert torch.equal(gradient_penalty(compiled, *pair, alpha=alpha), gradient_penalty(critic, *pair, alpha=alpha))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_critic_with_a_compiled_part_can_be_differentiated_twice(in_place):
    critic, pair, alpha = nn.Sequential(Critic((4, 3)), nn.Linear(1, 1)), samples((4, 3)), torch.rand(4)
    expected = gradient_penalty(copy.deepcopy(critic), *pair, alpha=alpha)
    if in_place:
        critic[0].compile(backend="aot_eager")
    else:
        critic[0] = torch.compile(critic[0], backend="aot_eager")
    penalty = gradient_penalty(critic, *pair, alpha=alpha)
    penalty.backward()
    assert torch.equal(penalty, expected)
    assert critic(pair[0]).shape == (4, 1)


def test_a_penalty_can_be_used_in_a_custom_objective():
    critic = Critic((4, 3))
    trainer = create_trainer(
        critic,
        torch.optim.SGD(critic.parameters(), lr=0.1),
        None,
        compute_loss=lambda model, batch: model(batch).mean() + GradientPenalty()(model, batch, -batch),
    )
    assert trainer.run([torch.randn(4, 3)] * 3).optimizer_step == 3


# -- mistakes of a commonly copied implementation ---------------------------------------------------------------------


def copied_penalty(critic, real, fake, alpha):
    """The commonly copied penalty. It assumes four dimensions, and flattens with ``view``."""
    alpha = alpha.view(-1, 1, 1, 1)
    points = alpha * real + (1 - alpha) * fake
    points.requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return 10 * ((gradient.view(len(real), -1).norm(2, dim=1) - 1) ** 2).mean()


class LastDimensionCritic(nn.Module):
    """A critic that accepts any number of dimensions before the features."""

    def forward(self, x):
        return x.square().flatten(1).sum(1)


def test_samples_of_two_dimensions_are_interpolated_per_sample():
    real, fake = samples((5, 7))
    alpha = torch.rand(5)
    points = alpha[:, None] * real + (1 - alpha[:, None]) * fake
    right = 10 * ((2 * points).norm(dim=1) - 1).square().mean()
    assert gradient_penalty(LastDimensionCritic(), real, fake, alpha=alpha).item() == pytest.approx(right.item(), rel=1e-5)
    wrong = copied_penalty(LastDimensionCritic(), real, fake, alpha).item()
    assert wrong != pytest.approx(right.item(), rel=0.05)


def test_channels_last_samples_work_although_view_fails():
    critic = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1))
    real, fake = (x.contiguous(memory_format=torch.channels_last) for x in samples((4, 3, 6, 5)))
    critic(real)
    alpha = torch.rand(4)
    with pytest.raises(RuntimeError, match="view"):
        copied_penalty(critic.to(memory_format=torch.channels_last), real, fake, alpha)
    own = gradient_penalty(critic, real, fake, alpha=alpha)
    other = gradient_penalty(critic, real.contiguous(), fake.contiguous(), alpha=alpha)
    assert own.item() == pytest.approx(other.item(), rel=1e-5)


def test_the_generator_gets_no_gradient_from_the_penalty():
    generator, critic = nn.Conv2d(1, 1, 1), nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    real, latents, alpha = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.rand(3)

    def copied_penalty_with_graph(fake):  # the copied penalty with points that are not detached
        points = alpha.view(-1, 1, 1, 1) * real + (1 - alpha.view(-1, 1, 1, 1)) * fake
        (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()

    copied_penalty_with_graph(generator(latents)).backward()
    assert generator.weight.grad.abs().max() > 0
    generator.weight.grad = None
    gradient_penalty(critic, real, generator(latents), alpha=alpha).backward()
    assert generator.weight.grad is None


def test_the_penalty_does_not_overflow_under_fp16():
    critic = linear_critic(300.0, 400.0)
    with torch.autocast("cpu", dtype=torch.float16):
        value = gradient_penalty(critic, *samples((6, 2)))
    assert (torch.tensor(499.0, dtype=torch.float16) ** 2).isinf()
    assert value.item() == pytest.approx(10 * 499.0**2, rel=1e-5)
