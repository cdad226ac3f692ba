"""Scenarios of evaluation, of metrics over all ranks, and of averaged weights."""

from typing import Any

import torch
from ignite.metrics import Accuracy, Loss
from scenarios import (
    OUTPUT,
    SAMPLES,
    UnsizedData,
    dataset,
    ddp,
    error_of,
    fsdp,
    full_weights,
    fully_shard,
    loader,
    max_difference,
    plain_model,
    rank,
    scenario,
    trainer_of,
    world_size,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from camshaft import CheckpointRotation, Evaluation, ExponentialMovingAverage, create_evaluator


@scenario(1, 2, 3)
def metrics_over_all_ranks() -> Any:
    """Twelve batches, of which rank 0 has seven if there are others."""
    metrics = {"accuracy": Accuracy(), "loss": Loss(nn.functional.cross_entropy)}
    evaluator = create_evaluator(ddp(plain_model()), metrics=metrics)
    x, y = dataset().tensors
    batches = [(x[a : a + 7], y[a : a + 7]) for a in range(0, SAMPLES, 7)]
    if world_size() > 1:
        batches = batches[:7] if rank() == 0 else batches[7 + rank() - 1 :: world_size() - 1]
    return dict(evaluator.run(batches).metrics)


@scenario()
def evaluation_before_the_first_step() -> Any:
    """The difference that an evaluation before training makes to the trained weights of a sharded model."""
    trained = []
    for is_evaluated in (False, True):
        model = fsdp(plain_model())
        if is_evaluated:
            create_evaluator(model).run(loader())
        trainer_of(model).run(loader())
        trained.append(full_weights(model))
    return max_difference(*trained)


@scenario()
def evaluation_of_data_of_unknown_length() -> Any:
    """The number of batches that each rank evaluates if rank 1 has one more; twice, by one evaluator."""
    evaluator, batches = create_evaluator(fsdp(plain_model())), list(loader())
    counts = [evaluator.run(UnsizedData(batches[: shortest + rank()])).iteration for shortest in (2, 4)]
    return counts, error_of(lambda: evaluator.run(batches[: 2 + rank()]))


# -- averaged weights -----------------------------------------------------------------------------------------------------


def train_with_ema(wrap: Any, folder: Any, epochs: int, **options: Any) -> tuple[Any, Any]:
    """Trains, or resumes, a model whose averaged weights are evaluated after each epoch."""
    model = wrap(nn.Sequential(plain_model(), nn.BatchNorm1d(3, momentum=None).double()))
    trainer = trainer_of(model)
    ema = ExponentialMovingAverage(0.7).attach(trainer)
    evaluator = create_evaluator(model, {"loss": Loss(nn.functional.cross_entropy)})
    Evaluation(evaluator, loader(), ema=ema).attach(trainer)
    checkpoints = CheckpointRotation(folder, **options).attach(trainer)
    if list(folder.glob("step-*")):
        checkpoints.resume("auto")
    trainer.run(loader(), max_epochs=epochs)
    return trainer, ema


def averaged_weights(ema: Any) -> dict[str, torch.Tensor]:
    with ema.swapped_in() as model:
        return full_weights(model)


@scenario()
def averages_of_a_sharded_model() -> Any:
    """Compared with those under DDP, after a run that was stopped and resumed from a sharded or a full checkpoint."""
    trainer, ema = train_with_ema(DistributedDataParallel, OUTPUT / "ema-ddp", 2)
    averages, trained = averaged_weights(ema), full_weights(trainer.primary.module)
    loss = trainer.state.metrics["val/loss"]
    differences = {}
    for kind in ("sharded", "full"):
        folder, options = OUTPUT / f"ema-{kind}", {"sharded": kind == "sharded"}
        train_with_ema(fully_shard, folder, 1, **options)
        trainer, ema = train_with_ema(fully_shard, folder, 2, **options)
        differences[kind] = {
            "averages": max_difference(averaged_weights(ema), averages),
            "weights": max_difference(full_weights(trainer.primary.module), trained),
            "loss": abs(trainer.state.metrics["val/loss"] - loss),
        }
    distance = max_difference(averages, trained)
    return differences | {"averages from weights": distance, "module": error_of(lambda: ema.module)}
