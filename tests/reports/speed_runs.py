"""Small runs whose speed is explained, and helpers that read the report."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from camshaft import create_gan_trainer, create_trainer

FIGURE = r"measured \d+\.\d\d times as fast \(quartiles \d+\.\d\d to \d+\.\d\d\), \d+ us becomes \d+ us"


def said(trainer):
    """What is said of speed, without the cycle before it."""
    cycle, _, speed = trainer.explain(speed=True).partition("\n\n")
    assert cycle == trainer.explain()
    return speed


def picture_data(number=12):
    """Some small pictures and their classes."""
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(number, 3, 6, 6, generator=generator), torch.randint(4, (number,), generator=generator))


def picture_trainer(layer=nn.Conv2d, **options):
    """A network in which every pass draws random numbers and moves statistics."""
    torch.manual_seed(5)
    model = nn.Sequential(layer(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(128, 4))
    return create_trainer(model, torch.optim.AdamW(model.parameters()), nn.functional.cross_entropy, **options)


def game(**options):
    """A GAN of two linear networks."""
    torch.manual_seed(2)
    networks = nn.Linear(4, 2), nn.Linear(2, 1)
    return create_gan_trainer(*networks, *(torch.optim.Adam(n.parameters()) for n in networks), latent=4, **options)
