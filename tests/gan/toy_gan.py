"""A small GAN, its data and the formulas of its losses."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu, softplus

from camshaft import (
    create_gan_trainer,
)

SAMPLES = 8


def make(generator=None, critic=None, **settings):
    generator = nn.Linear(3, 2) if generator is None else generator
    critic = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)) if critic is None else critic
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05) for network in (generator, critic)]
    settings.setdefault("latent", 3)
    return create_gan_trainer(generator, critic, *optimizers, **settings)


def data(batches=6, *shape):
    return [torch.randn(SAMPLES, *(shape or (2,))) for _ in range(batches)]


def module(trainer, phase):
    return trainer.phases[phase].module


FORMULAS = {
    "wgan": (lambda r, f: f.mean() - r.mean(), lambda f: -f.mean()),
    "hinge": (lambda r, f: relu(1 - r).mean() + relu(1 + f).mean(), lambda f: -f.mean()),
    "non_saturating": (lambda r, f: softplus(-r).mean() + softplus(f).mean(), lambda f: softplus(-f).mean()),
    "least_squares": (
        lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
        lambda f: ((f - 1) ** 2).mean() / 2,
    ),
}
