"""docs/from-your-loop/gradient-penalty.md: the commonly copied function and its replacement."""

import pytest
import torch
from snippet_pages import copied, instead, printed

ALPHA = "Gradient penalty with `alpha = torch.rand(batch_size, 1, 1, 1)`"
VIEW = "Gradient penalty with `gradients.view(...)`, and a `fake` that isn't detached"
ROOT = "Gradient penalty is NaN: `torch.sqrt(torch.sum(gradients ** 2, dim=1))`"


def penalty_by_hand(critic, real, fake, alpha):
    """The penalty, computed sample by sample."""
    terms = []
    for a, r, f in zip(alpha, real, fake, strict=True):
        point = (a * r + (1 - a) * f)[None].requires_grad_()
        (gradient,) = torch.autograd.grad(critic(point).sum(), point)
        terms.append((gradient.norm() - 1) ** 2)
    return float(10 * sum(terms) / len(terms))


def test_an_alpha_for_images_gives_a_wrong_penalty_for_vectors():
    page = copied(ALPHA)
    right = penalty_by_hand(page.critic, page.real, page.fake, page.alpha)
    assert abs(page.wrong.item() - right) > 0.5 * right


def test_an_alpha_for_images_raises_for_sequences():
    page = copied(ALPHA)
    critic = torch.nn.Conv1d(8, 1, 8)
    with pytest.raises(RuntimeError, match=r"Expected 2D .* or 3D .* input"):
        page.copied_penalty(critic, page.rows, page.fake_rows, page.alpha)


def test_the_penalty_is_correct_for_any_number_of_dimensions():
    page = instead(ALPHA)
    assert len(page.shapes) == 4
    for shape, critic in page.shapes.values():
        real, fake = page.real.reshape(-1, *shape), page.fake.reshape(-1, *shape)
        penalty = page.gradient_penalty(critic, real, fake, alpha=page.alpha)
        assert penalty.item() == pytest.approx(penalty_by_hand(critic, real, fake, page.alpha), rel=1e-4)


def test_the_copied_penalty_trains_the_generator_and_fails_on_channels_last():
    page = copied(VIEW)
    assert page.generator.weight.grad.norm() > 0
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        page.copied_penalty(page.critic, *page.images, page.alpha)


def test_the_penalty_trains_only_the_critic():
    page = instead(VIEW)
    assert page.generator.weight.grad is None
    assert page.critic[0].weight.grad.norm() > 0


def test_the_gradient_of_the_square_root_is_not_finite_at_zero():
    assert copied(ROOT).critic[0].weight.grad.isnan().all()


def test_the_gradient_of_the_penalty_is_finite_at_zero():
    page = instead(ROOT)
    assert page.penalty.dtype is torch.float32
    assert page.penalty.item() == 10
    assert "NaN: 0 of 1024" in printed(ROOT, "instead")
