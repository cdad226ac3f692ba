"""Arguments and batches that the GAN trainer rejects."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from toy_gan import FORMULAS, SAMPLES, data, make

from camshaft import (
    R1,
    GradientPenalty,
    create_gan_trainer,
)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"discriminator_steps": 0}, ValueError, "discriminator_steps must be a positive integer, got 0"),
        ({"discriminator_steps": 1.5}, ValueError, "discriminator_steps must be a positive integer, got 1.5"),
        ({"loss": "wasserstein"}, ValueError, "loss must be one of 'wgan', 'hinge', .* got 'wasserstein'"),
        ({"loss": (len,)}, TypeError, "pair of callables"),
        ({"loss": len}, TypeError, "pair of callables"),
        ({"latent": 0}, ValueError, "latent must be a positive integer, .* got 0"),
        ({"latent": "128"}, ValueError, "latent must be .* got '128'"),
        ({"penalty": 10.0}, TypeError, r"penalty must be GradientPenalty\(\), .* got 10.0"),
        ({"penalty": R1}, TypeError, r"not the class R1; write R1\(\)"),
        ({"prepare_batch": 3}, TypeError, "prepare_batch must be callable, got 3"),
        ({"prepare_batch": lambda batch: batch}, TypeError, r"called as prepare_batch\(batch, device=.* takes \(batch\)"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be a positive integer, got 0"),
        ({"clip_grad_norm": -1}, ValueError, "clip_grad_norm .* must be a positive number, got -1"),
        ({"amp": "fp8"}, ValueError, "amp must be .* got 'fp8'"),
        ({"critic": nn.Linear(2, 1).to("meta")}, ValueError, "generator is on 'cpu' and the discriminator on 'meta'"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_invalid_arguments_raise_at_creation(settings, error, text):
    with pytest.raises(error, match=text):
        make(**settings)


@pytest.mark.parametrize("phase", ["generator", "discriminator"])
def test_an_error_names_the_network_that_is_not_a_module(phase):
    networks = {"generator": nn.Linear(3, 2), "discriminator": nn.Linear(2, 1)}
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks.values()]
    networks[phase] = torch.relu
    with pytest.raises(TypeError, match=f"model of phase '{phase}' must be a torch.nn.Module, got builtin"):
        create_gan_trainer(*networks.values(), *optimizers, latent=3)


def test_the_same_parameters_in_both_optimizers_raise():
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    both = torch.optim.SGD([*generator.parameters(), *critic.parameters()], lr=0.1)
    own = torch.optim.SGD(generator.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="phases 'discriminator' and 'generator' hold the same parameters"):
        create_gan_trainer(generator, critic, own, both, latent=3)


def test_swapped_optimizers_raise():
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (critic, generator)]
    with pytest.raises(ValueError, match="phase 'discriminator' holds no parameter of the model"):
        create_gan_trainer(generator, critic, *optimizers, latent=3)


def test_a_scheduler_of_the_other_network_raises():
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (generator, critic)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizers[0], 2)
    with pytest.raises(ValueError, match="discriminator_scheduler .StepLR. was made for the generator's optimizer"):
        create_gan_trainer(generator, critic, *optimizers, latent=3, discriminator_scheduler=schedule)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (
            {"latent": lambda n, d: torch.randn(n - 1, 3)},
            ValueError,
            r"latent .* n=8 samples first, got .*\(7, 3\) in iteration 1",
        ),
        ({"latent": lambda n, d: None}, ValueError, "latent .* must return a tensor .* got a NoneType in iteration 1"),
        ({"generator": nn.Linear(3, 4)}, ValueError, r"generator Linear must .* \(8, 2\), got .* \(8, 4\) in iteration 1"),
        ({"critic": nn.Linear(2, 2)}, ValueError, r"discriminator Linear must return one number per sample, .* in iteration 1"),
        ({"loss": (lambda r, f: r, lambda f: f)}, ValueError, "loss of the discriminator .* in iteration 1.* must be a scalar"),
        (
            {"loss": (FORMULAS["wgan"][0], lambda f: f)},
            ValueError,
            "loss of the generator .* in iteration 1.* must be a scalar",
        ),
        ({"loss": (FORMULAS["wgan"][0], lambda f: 1.0)}, TypeError, "loss of the generator .* must be a scalar tensor"),
        (
            {"penalty": lambda critic, real, fake: critic(real)},
            ValueError,
            "penalty .*lambda.* in iteration 1.* must be a scalar",
        ),
        ({"conditional": True}, TypeError, r"conditional=True needs batches \(x, y\), .* in iteration 1"),
        ({"prepare_batch": lambda batch, device, non_blocking: None}, TypeError, "prepare_batch .* real samples as a tensor"),
    ],
)
def test_errors_during_the_run_name_the_network_and_the_iteration(settings, error, text):
    with pytest.raises(error, match=text):
        make(**settings).run(data(2))


def test_an_error_in_a_later_iteration_names_it():
    with pytest.raises(ValueError, match="in iteration 3, in the turn of the discriminator"):
        make().run([*data(2), torch.randn(SAMPLES, 5, 2)])


def test_a_batch_that_is_not_a_tensor_raises_and_suggests_prepare_batch():
    with pytest.raises(TypeError, match="a batch must be a tensor x.*keys.*pass prepare_batch="):
        make().run([{"image": x} for x in data(2)])


def test_batch_norm_with_a_penalty_gives_one_warning():
    critic = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="BatchNorm"):
        trainer = make(critic=critic, penalty=[GradientPenalty(), R1()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run(data(2))
        make(critic=nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
