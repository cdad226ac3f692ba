"""The penalties against a float64 reference and central differences, and where the snippet from a blog goes wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from camshaft import DRAGAN, R1, R2, GradientPenalty, create_trainer, gradient_penalty

SHAPES = {1: (5,), 2: (5, 7), 3: (5, 3, 4), 4: (5, 3, 4, 2), 5: (5, 2, 3, 2, 2)}
PENALTIES = [GradientPenalty(), DRAGAN(), R1(), R2()]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


class Critic(nn.Module):
    """A smooth critic for samples of any shape; its scores come in the order of the samples or in another."""

    def __init__(self, shape: tuple[int, ...], permuted: bool = False) -> None:
        super().__init__()
        size = torch.Size(shape[1:]).numel()
        self.first, self.last, self.permuted = nn.Linear(size, 6), nn.Linear(6, 1), permuted

    def forward(self, x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        hidden = torch.tanh(self.first(x.reshape(len(x), -1)))
        scores = self.last(hidden) * scale
        return scores.flip(0) if self.permuted else scores


def samples(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=torch.float64).to(dtype), 2 * torch.randn(shape, dtype=torch.float64).to(dtype)


def reference(critic: Critic, real: torch.Tensor, fake: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """In float64, one sample after the other, the gradient of tanh written out by hand: 10 * mean((norm - 1)**2)."""
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


def assert_is_the_reference(
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
def test_is_the_reference_in_value_and_parameter_gradients(rank, dtype, permuted):
    critic = Critic(SHAPES[rank], permuted).to(dtype)
    assert_is_the_reference(critic, *samples(SHAPES[rank], dtype))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [2, 4])
def test_stays_in_float32_under_autocast(rank, autocast):
    assert_is_the_reference(Critic(SHAPES[rank]), *samples(SHAPES[rank]), autocast)


def test_any_memory_format():
    real, fake = samples(SHAPES[4])
    real = real.contiguous(memory_format=torch.channels_last)
    assert_is_the_reference(Critic(SHAPES[4]), real, fake.transpose(2, 3).contiguous().transpose(2, 3))


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_parameter_gradients_are_those_of_central_differences(penalty):
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
    """A critic whose gradient is the same everywhere: ``rows``."""
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
def test_value_for_a_gradient_of_norm_five(penalty, expected):
    assert penalty(linear_critic(3.0, 4.0), *samples((6, 2))).item() == pytest.approx(expected, rel=1e-6)


class Recorder(nn.Linear):
    """Keeps the points at which it was asked."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.points = x.detach()
        return super().forward(x)


@pytest.mark.parametrize(("penalty", "expected"), [(R1(), 0), (R2(), 1)], ids=repr)
def test_points_of_r1_and_r2(penalty, expected):
    critic, pair = Recorder(3, 1), samples((4, 3))
    penalty(critic, *pair)
    assert torch.equal(critic.points, pair[expected])


def test_points_lie_on_the_line_between_fake_and_real_with_an_alpha_for_each_sample():
    critic, (real, fake) = Recorder(3, 1), samples((50, 3))
    GradientPenalty()(critic, real, fake)
    shares = (critic.points - fake) / (real - fake)
    torch.testing.assert_close(shares, shares[:, :1].expand(-1, 3), rtol=1e-3, atol=1e-3)
    assert 0 <= shares.min() < 0.2
    assert 0.8 < shares.max() <= 1


def test_points_of_dragan_are_the_real_samples_and_noise_of_its_std():
    critic, (real, fake) = Recorder(30, 1), samples((200, 30))
    DRAGAN(std=0.25)(critic, real, fake)
    noise = critic.points - real
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(0.25, rel=0.05)


def test_alpha_is_the_share_of_the_real_sample():
    critic, (real, fake) = Recorder(3, 1), samples((2, 3))
    gradient_penalty(critic, real, fake, alpha=torch.tensor([1.0, 0.0]))
    assert torch.equal(critic.points, torch.stack([real[0], fake[1]]))


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_finite_where_the_gradient_is_zero(penalty):
    critic = Critic((4, 3))
    nn.init.zeros_(critic.last.weight)
    value = penalty(critic, *samples((4, 3)))
    value.backward()
    assert value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_gradients_go_to_the_critic_alone(penalty):
    generator, critic = nn.Linear(2, 3), Critic((4, 3))
    real = torch.randn(4, 3, requires_grad=True)
    penalty(critic, real, generator(torch.randn(4, 2))).backward()
    assert generator.weight.grad is None
    assert real.grad is None
    assert critic.first.weight.grad.abs().max() > 0


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_conditions_reach_the_critic_without_their_graph(penalty):
    critic, scale = linear_critic(3.0, 4.0), torch.tensor([2.0], requires_grad=True)
    pair = samples((6, 2))

    def conditional(x, scale):
        return critic(x) * scale

    penalty(conditional, *pair, scale).backward()
    doubled = penalty(conditional, *pair, scale.detach()).item()
    assert doubled == pytest.approx(penalty(linear_critic(6.0, 8.0), *pair).item(), rel=1e-6)
    assert scale.grad is None


def test_half_precision_samples_are_taken_to_float32():
    critic, (real, fake) = Critic((4, 3)), samples((4, 3))
    alpha = torch.rand(4)
    own = gradient_penalty(critic, real.bfloat16(), fake.half(), alpha=alpha)
    assert own.dtype == torch.float32
    assert own.item() == gradient_penalty(critic, real.bfloat16().float(), fake.half().float(), alpha=alpha).item()


def test_samples_made_in_inference_mode_will_do():
    with torch.inference_mode():
        real, fake = samples((4, 3))
    for penalty in PENALTIES:
        assert penalty(Critic((4, 3)), real, fake).requires_grad


def test_a_compiled_critic_is_differentiated_twice():
    critic, pair, alpha = Critic((4, 3)), samples((4, 3)), torch.rand(4)
    compiled = torch.compile(critic, backend="eager")
    assert torch.equal(gradient_penalty(compiled, *pair, alpha=alpha), gradient_penalty(critic, *pair, alpha=alpha))


# -- what the snippet from a blog gets wrong --------------------------------------------------------------------------


def blog(critic, real, fake, alpha):
    """As it is copied around: four dimensions taken for agreed, and one norm over what ``view`` makes of them."""
    alpha = alpha.view(-1, 1, 1, 1)
    points = alpha * real + (1 - alpha) * fake
    points.requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return 10 * ((gradient.view(len(real), -1).norm(2, dim=1) - 1) ** 2).mean()


class AnyWidth(nn.Module):
    """A critic that doesn't mind how many dimensions come before the features."""

    def forward(self, x):
        return x.square().flatten(1).sum(1)


def test_rank_two_isn_t_taken_for_rank_four():
    real, fake = samples((5, 7))
    alpha = torch.rand(5)
    points = alpha[:, None] * real + (1 - alpha[:, None]) * fake
    right = 10 * ((2 * points).norm(dim=1) - 1).square().mean()
    assert gradient_penalty(AnyWidth(), real, fake, alpha=alpha).item() == pytest.approx(right.item(), rel=1e-5)
    wrong = blog(AnyWidth(), real, fake, alpha).item()
    assert wrong != pytest.approx(right.item(), rel=0.05)


def test_channels_last_doesn_t_fail_as_view_does():
    critic = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1))
    real, fake = (x.contiguous(memory_format=torch.channels_last) for x in samples((4, 3, 6, 5)))
    critic(real)
    alpha = torch.rand(4)
    with pytest.raises(RuntimeError, match="view"):
        blog(critic.to(memory_format=torch.channels_last), real, fake, alpha)
    own = gradient_penalty(critic, real, fake, alpha=alpha)
    other = gradient_penalty(critic, real.contiguous(), fake.contiguous(), alpha=alpha)
    assert own.item() == pytest.approx(other.item(), rel=1e-5)


def test_the_generator_gets_no_gradient_as_the_blog_gives_it():
    generator, critic = nn.Conv2d(1, 1, 1), nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    real, latents, alpha = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.rand(3)

    def unguarded(fake):  # the blog's, with points that keep their graph
        points = alpha.view(-1, 1, 1, 1) * real + (1 - alpha.view(-1, 1, 1, 1)) * fake
        (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()

    unguarded(generator(latents)).backward()
    assert generator.weight.grad.abs().max() > 0
    generator.weight.grad = None
    gradient_penalty(critic, real, generator(latents), alpha=alpha).backward()
    assert generator.weight.grad is None


def test_no_overflow_under_fp16_where_a_half_precision_square_overflows():
    critic = linear_critic(300.0, 400.0)
    with torch.autocast("cpu", dtype=torch.float16):
        value = gradient_penalty(critic, *samples((6, 2)))
    assert (torch.tensor(499.0, dtype=torch.float16) ** 2).isinf()
    assert value.item() == pytest.approx(10 * 499.0**2, rel=1e-5)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_batch_norm_in_the_critic_gives_one_warning_that_says_why():
    critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match=r"BatchNorm \(1\).*depend on the whole batch"):
        GradientPenalty()(critic, *samples((4, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        R1()(critic, *samples((4, 3)))


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_is_an_error(penalty, mode):
    with mode(), pytest.raises(RuntimeError, match="no_grad"):
        penalty(Critic((4, 3)), *samples((4, 3)))


@pytest.mark.parametrize(
    ("real", "fake", "settings", "error", "text"),
    [
        (torch.ones(4, 3), torch.ones(4, 2), {}, ValueError, r"same shape, got \(4, 3\) and \(4, 2\)"),
        (torch.ones(4, 3), torch.ones(5, 3), {}, ValueError, r"same shape, got \(4, 3\) and \(5, 3\)"),
        (torch.ones(4, 3), torch.ones(4, 3), {"alpha": torch.ones(4, 1)}, ValueError, r"alpha must be .* shape \(4,\)"),
        (torch.ones(4, 3), torch.ones(4, 3), {"alpha": 0.5}, ValueError, r"alpha must be .* got a float"),
        (torch.ones(0, 3), torch.ones(0, 3), {}, ValueError, "real must hold at least one sample"),
        (torch.ones(4, 3, dtype=torch.uint8), torch.ones(4, 3), {}, TypeError, "real must be floating-point"),
        (torch.ones(4, 3), [1.0], {}, TypeError, "fake must be a tensor"),
    ],
)
def test_samples_that_don_t_fit_are_errors(real, fake, settings, error, text):
    with pytest.raises(error, match=text):
        gradient_penalty(nn.Linear(3, 1), real, fake, **settings)


@pytest.mark.parametrize(
    ("critic", "error", "text"),
    [
        (nn.Linear(3, 2), ValueError, r"critic Linear must return one number per sample, 4 in all, got .*\(4, 2\)"),
        (lambda x: x.sum(), ValueError, "one number per sample"),
        (lambda x: x.sum(1).detach(), ValueError, "don't depend on its input"),
        (lambda x: torch.ones(4, requires_grad=True) * 2, ValueError, "don't depend on its input"),
        (lambda x: None, TypeError, "must return a tensor of scores, got a NoneType"),
        (None, TypeError, "critic must be callable, got None"),
    ],
)
def test_critics_that_can_t_be_penalised_are_errors(critic, error, text):
    with pytest.raises(error, match=text):
        gradient_penalty(critic, torch.ones(4, 3), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GradientPenalty(weight=-1), "weight of GradientPenalty must be a finite number of at least 0, got -1"),
        (lambda: GradientPenalty(center=float("nan")), "center of GradientPenalty"),
        (lambda: GradientPenalty(every=0), "every of GradientPenalty must be a positive integer, got 0"),
        (lambda: DRAGAN(std=None), "std of DRAGAN"),
        (lambda: R1(weight="10"), "weight of R1"),
        (lambda: R2(every=1.5), "every of R2"),
    ],
)
def test_settings_out_of_range_are_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_penalty_in_an_objective_of_one_s_own():
    critic = Critic((4, 3))
    trainer = create_trainer(
        critic,
        torch.optim.SGD(critic.parameters(), lr=0.1),
        None,
        compute_loss=lambda model, batch: model(batch).mean() + GradientPenalty()(model, batch, -batch),
    )
    assert trainer.run([torch.randn(4, 3)] * 3).optimizer_step == 3
