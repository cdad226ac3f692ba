"""Small runs whose checkpoints an earlier version of the package has written, in the folder ``earlier``.

Run as a script, with the earlier version on the path, it writes them again.
"""

import sys
from pathlib import Path

import torch
from ignite.metrics import Loss
from torch.utils.data import DataLoader, TensorDataset

import camshaft
from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Evaluation,
    Events,
    ExponentialMovingAverage,
    GradientPenalty,
    LRHistory,
    create_evaluator,
    create_gan_trainer,
    create_trainer,
)

torch.set_num_threads(1)

FOLDER = Path(__file__).parent / "earlier"
EPOCHS = 3


def digits(samples=22):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def supervised(folder):
    """Everything at once: accumulation, float16, a schedule, clipping, an average, history, evaluation, shuffled data."""
    camshaft.seed_everything(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trainer = create_trainer(
        model,
        optimizer,
        torch.nn.functional.mse_loss,
        amp="fp16",
        accumulation_steps=3,
        loss_weight="samples",
        clip_grad_norm=0.5,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )
    evaluator = create_evaluator(model, metrics={"loss": Loss(torch.nn.functional.mse_loss)})
    Evaluation(evaluator, DataLoader(digits(8), 4)).attach(trainer)
    EarlyStopping("val/loss", mode="min", patience=9).attach(trainer)
    ExponentialMovingAverage(0.9).attach(trainer)
    LRHistory().attach(trainer)
    return trainer, CheckpointRotation(folder, keep_last=99).attach(trainer), DataLoader(digits(), 4, shuffle=True)


def gan(folder):
    """Two networks, a penalty, and a shuffled loader."""
    camshaft.seed_everything(2)
    generator, critic = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    optimizers = [torch.optim.Adam(network.parameters(), lr=0.01) for network in (generator, critic)]
    trainer = create_gan_trainer(
        generator, critic, *optimizers, latent=2, penalty=GradientPenalty(), discriminator_steps=2, accumulation_steps=2
    )
    data = TensorDataset(digits().tensors[0])
    return trainer, CheckpointRotation(folder, keep_last=99).attach(trainer), DataLoader(data, 4, shuffle=True)


MAKERS = {"supervised": supervised, "gan": gan}
STOPS = {"supervised": (6, 8, 10), "gan": (5, 6)}
"""After which iterations the earlier version has stopped: at an epoch's end, inside a window, between two."""


def write(name, stop, folder):
    trainer, checkpoints, data = MAKERS[name](folder)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda engine: engine.terminate())
    trainer.run(data, max_epochs=EPOCHS)
    return checkpoints.last


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name, stops in STOPS.items():
        for stop in stops:
            path = write(name, stop, target / f"{name}-{stop}")
            path.replace(target / f"{name}-{stop}.pt")
