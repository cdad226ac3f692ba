"""Small trainers for the tests of the speed report."""

import re

import torch
from torch import nn
from torch.utils.data import TensorDataset

from camshaft import create_gan_trainer, create_trainer

MEASUREMENT = r"measured \d+\.\d\d times as fast \(quartiles \d+\.\d\d to \d+\.\d\d\), \d+ us becomes \d+ us"


def speed_report(trainer):
    """The part of ``explain(speed=True)`` after the training cycle."""
    cycle, _, speed = trainer.explain(speed=True).partition("\n\n")
    assert cycle == trainer.explain()
    return speed


def picture_data(number=12):
    """Small images and their classes."""
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(number, 3, 6, 6, generator=generator), torch.randint(4, (number,), generator=generator))


def picture_trainer(layer=nn.Conv2d, **options):
    """A trainer of a network with dropout and batch norm."""
    torch.manual_seed(5)
    model = nn.Sequential(layer(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(128, 4))
    return create_trainer(model, torch.optim.AdamW(model.parameters()), nn.functional.cross_entropy, **options)


def small_gan(**options):
    """A GAN of two linear networks."""
    torch.manual_seed(2)
    networks = nn.Linear(4, 2), nn.Linear(2, 1)
    return create_gan_trainer(*networks, *(torch.optim.Adam(n.parameters()) for n in networks), latent=4, **options)


def advice_about(word, text):
    """The line of the report that contains the text, with its explanation."""
    (found,) = re.findall(rf"^.*{re.escape(word)}.*(?:\n      .*)?", text, re.MULTILINE)
    return found


def already_enabled(text):
    line = next((line for line in text.splitlines() if line.startswith("enabled already: ")), "")
    return re.split(r", (?!\w+=)(?!\.)", line.removeprefix("enabled already: "))


def suggestions(advice):
    return [item.suggestion for item in advice if not item.enabled]
