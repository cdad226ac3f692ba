"""Scenarios of GANs under DDP and FSDP2."""

from typing import Any

import torch
from scenarios import (
    FEATURES,
    dataset,
    ddp,
    error_of,
    full_weights,
    fully_shard,
    loader,
    max_difference,
    rank,
    scenario,
    sgd,
    world_size,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from camshaft import R1, create_gan_trainer, gradient_penalty


def make_networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    generator = nn.Linear(2, FEATURES).double()
    return generator, nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def weights_of_all(networks: Any) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": p for i, network in enumerate(networks) for name, p in full_weights(network).items()}


@scenario(1, 2, 3)
def a_gan_with_a_penalty() -> Any:
    networks = [ddp(network) for network in make_networks()]
    share = slice(None) if world_size() == 1 else slice(rank(), None, world_size())
    source = torch.Generator().manual_seed(5)

    def latent(n: int, device: Any) -> torch.Tensor:
        return torch.randn(n * world_size(), 2, generator=source, dtype=torch.float64)[share]

    trainer = create_gan_trainer(
        *networks, *(sgd(n) for n in networks), latent=latent, penalty=R1(5.0), discriminator_steps=2, accumulation_steps=2
    )
    trainer.run([x[share] for x, _ in DataLoader(dataset(), 12)], max_epochs=2)
    return weights_of_all(networks)


def train_gan(wrap_generator: Any, wrap_critic: Any) -> Any:
    generator, critic = make_networks()
    networks = [wrap_generator(generator), wrap_critic(critic)]
    source = torch.Generator().manual_seed(5 + rank())

    def latent(n: int, device: Any) -> torch.Tensor:
        return torch.randn(n, 2, generator=source, dtype=torch.float64)

    trainer = create_gan_trainer(*networks, *(sgd(n) for n in networks), latent=latent, penalty=R1())
    trainer.run([x for x, _ in loader()])
    return weights_of_all(networks)


@scenario()
def penalties_of_sharded_networks() -> Any:
    """A sharded critic is an error; a sharded generator is trained like one under DDP."""
    in_training = error_of(lambda: train_gan(fully_shard, fully_shard))
    critic = nn.Linear(3, 1)
    called = error_of(lambda: gradient_penalty(fully_shard(critic), torch.ones(4, 3), torch.zeros(4, 3)))
    sharded, replicated = (train_gan(wrap, DistributedDataParallel) for wrap in (fully_shard, DistributedDataParallel))
    return {"in training": in_training, "called": called, "difference": max_difference(sharded, replicated)}
