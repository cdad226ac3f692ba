"""Scenarios of training under FSDP2 (``fully_shard``)."""

from typing import Any

import torch
from gradient_sync_scenarios import weights_and_steps, weights_with_a_trained_loss_function
from scenarios import UnsizedData, fsdp, full_weights, fully_shard, loader, plain_model, scenario, trainer_of, world_size

from camshaft import NonFiniteGuard


@scenario(1, 2, 3)
def sharded_accumulation() -> Any:
    model = fsdp(plain_model())
    trainer_of(model, accumulation_steps=4, clip_grad_norm=0.5).run(loader(), max_epochs=3)
    return full_weights(model)


@scenario(1, 2, 3)
def sharded_losses_weighted_by_samples() -> Any:
    model = fsdp(plain_model())
    trainer = trainer_of(model, accumulation_steps=4, loss_weight="samples")
    NonFiniteGuard().attach(trainer)
    trainer.run(UnsizedData(loader()), max_epochs=3)
    return full_weights(model)


@scenario(1, 2, 3)
def sharded_training_with_max_iters() -> Any:
    """The data ends inside a window before the limit is reached."""
    trainer = trainer_of(fsdp(plain_model()), accumulation_steps=4)
    trainer.run(UnsizedData(loader()), max_iters=10)
    return weights_and_steps(trainer)


@scenario(1, 2, 3)
def parameters_outside_the_shards() -> dict[str, torch.Tensor]:
    """One layer is sharded. FSDP2 does not reduce the gradients of the other layers and of the loss function."""
    model = plain_model()
    if world_size() > 1:
        fully_shard(model[0])
    return {f"model.{name}": value for name, value in weights_with_a_trained_loss_function(model).items()}
