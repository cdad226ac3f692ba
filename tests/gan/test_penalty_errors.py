"""Gradient penalties: the errors for unsuitable critics, samples and arguments."""

from __future__ import annotations

import warnings

import pytest
import torch
from critics import PENALTIES, Critic, samples
from torch import nn

from camshaft import DRAGAN, R1, R2, GradientPenalty, gradient_penalty


def test_batch_norm_in_the_critic_gives_one_warning():
    critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match=r"BatchNorm \(1\).*depend on the whole batch"):
        GradientPenalty()(critic, *samples((4, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        R1()(critic, *samples((4, 3)))


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_penalty_without_gradients_enabled_raises(penalty, mode):
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
def test_incompatible_samples_raise(real, fake, settings, error, text):
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
def test_unsuitable_critics_raise(critic, error, text):
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
def test_arguments_out_of_range_raise(make, text):
    with pytest.raises(ValueError, match=text):
        make()
