"""Scenarios of gradient synchronization under DDP, and of models that are wrapped wrongly."""

from typing import Any

import torch
import torch.distributed as dist
from scenarios import (
    FEATURES,
    UnsizedData,
    dataset,
    ddp,
    error_of,
    full_weights,
    is_last_rank,
    loader,
    loss_without_class_zero,
    plain_model,
    rank,
    scenario,
    sgd,
    trainer_of,
    world_size,
)
from torch import nn

from camshaft import Events, LRScheduling, create_trainer


def weights_after_training(**settings: Any) -> dict[str, torch.Tensor]:
    model = ddp(plain_model())
    trainer_of(model, **settings).run(loader(), max_epochs=3)
    return full_weights(model)


def weights_and_steps(trainer: Any) -> dict[str, torch.Tensor]:
    return full_weights(trainer.primary.module) | {"steps": torch.tensor(trainer.state.optimizer_step)}


# -- the same numbers as one process --------------------------------------------------------------------------------------


@scenario(1, 2, 3)
def one_batch_per_step() -> Any:
    return weights_after_training()


@scenario(1, 2, 3)
def accumulation_with_a_partial_window() -> Any:
    return weights_after_training(accumulation_steps=4, clip_grad_norm=0.5)


@scenario(1, 2, 3)
def accumulation_that_drops_a_partial_window() -> Any:
    return weights_after_training(accumulation_steps=4, partial_window="drop")


@scenario(1, 2, 3)
def losses_weighted_by_samples() -> Any:
    """The ranks have batches of different sizes."""
    model = ddp(plain_model())
    x, y = dataset().tensors
    ends = [0, 7, 9, 20, 26, 27, 40, 44, 60, 71, 75, 80, 84]  # twelve batches
    pairs = [(x[a:b], y[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    n = world_size()
    windows = [pairs[0:6], pairs[6:12]] if n == 1 else [pairs[rank() : 6 : n], pairs[6 + rank() : 12 : n]]
    batches = [batch for window in windows for batch in window]
    trainer_of(model, accumulation_steps=6 // n, loss_weight="samples").run(batches, max_epochs=3)
    return full_weights(model)


@scenario(1, 2, 3)
def losses_weighted_by_a_function() -> Any:
    """A function of the batch returns its number of tokens."""
    return weights_after_training(
        accumulation_steps=3, loss_weight=lambda batch: float((batch[1] != 0).sum()), compute_loss=loss_without_class_zero
    )


@scenario(1, 2, 3)
def an_epoch_of_unknown_length() -> Any:
    trainer = trainer_of(ddp(plain_model()), accumulation_steps=3)
    trainer.run(UnsizedData(loader()), max_epochs=3)
    return weights_and_steps(trainer)


@scenario(1, 2, 3)
def an_epoch_ended_by_one_rank() -> Any:
    trainer = trainer_of(ddp(plain_model()), accumulation_steps=4)
    if is_last_rank():
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), trainer.terminate_epoch)
    trainer.run(loader(), max_epochs=2)
    return weights_and_steps(trainer)


class ScaledCrossEntropy(nn.Module):
    """A loss function with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(y_pred * self.temperature, y)


def weights_with_a_trained_loss_function(model: nn.Module) -> dict[str, torch.Tensor]:
    loss_fn = ScaledCrossEntropy()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1)
    create_trainer(model, optimizer, loss_fn, accumulation_steps=4).run(loader(), max_epochs=2)
    return full_weights(model) | {"temperature": loss_fn.temperature.detach()}


@scenario(1, 2, 3)
def parameters_outside_the_ddp_wrapper() -> Any:
    return weights_with_a_trained_loss_function(ddp(plain_model()))


# -- when gradients are reduced -------------------------------------------------------------------------------------------


@scenario(2, 3)
def reductions() -> Any:
    """The number of gradient reductions, and of optimizer steps."""
    model = ddp(plain_model())
    count = [0]

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        count[0] += bucket.is_last()
        return dist.all_reduce(bucket.buffer().div_(world_size()), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    trainer = trainer_of(model, accumulation_steps=4)
    trainer.run(loader(), max_epochs=3)
    return {"reductions": count[0], "steps": trainer.state.optimizer_step}


@scenario()
def a_plain_backward_pass_after_a_run() -> Any:
    """The run ends inside a window; a backward pass after it must be reduced."""
    model = ddp(plain_model())
    trainer = trainer_of(model, accumulation_steps=4)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate)
    trainer.run(loader())
    model.zero_grad()
    model(torch.full((4, FEATURES), 1.0 + rank()).double()).square().mean().backward()
    return [p.grad for p in model.parameters()]


# -- mistakes -------------------------------------------------------------------------------------------------------------


@scenario()
def a_model_that_is_not_wrapped() -> str:
    return error_of(lambda: trainer_of(plain_model()).run(loader()))


@scenario()
def an_objective_that_bypasses_ddp() -> str:
    """Its gradients are never reduced."""
    model = ddp(plain_model())
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda m, batch: loss_without_class_zero(m.module, batch))
    return error_of(lambda: trainer.run(loader()))


@scenario()
def a_schedule_that_differs_between_ranks() -> str:
    trainer = trainer_of(ddp(plain_model()))
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.primary.optimizers[0], patience=0)
    LRScheduling(schedule, metric="score").attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=float(-e.state.epoch * rank())))
    return error_of(lambda: trainer.run(loader(), max_epochs=4))


@scenario()
def parameters_unfrozen_after_wrapping() -> str:
    """DDP ignores parameters that were frozen when it was constructed."""
    model = plain_model()
    model[0].requires_grad_(False)
    trainer = trainer_of(ddp(model))
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: model[0].requires_grad_(True))
    return error_of(lambda: trainer.run(loader(), max_epochs=3))
