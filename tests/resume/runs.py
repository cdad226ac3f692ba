"""Runs to stop and resume, with every feature that draws random numbers or has a state."""

from __future__ import annotations

import random

import numpy as np
import torch
from ignite.metrics import Accuracy
from torch import nn
from torch.utils.data import DataLoader, Dataset

from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Evaluation,
    ExponentialMovingAverage,
    LRHistory,
    SeededDataset,
    create_evaluator,
    create_trainer,
    seed_everything,
    worker_init_fn,
)


class NoisyDataset(Dataset):
    """Samples with an augmentation that draws from every global generator."""

    def __init__(self, size: int = 40, *, noise: bool = True) -> None:
        self.noise = noise
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, 6, generator=generator)
        self.y = torch.randint(3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        if not self.noise:
            return self.x[index], self.y[index]
        noise = 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.x[index] + noise, self.y[index]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def make_run(folder, *, workers=0, amp=None, seeded=True, epochs=5, every=None, **options):
    """Makes a run of 13 batches per epoch in windows of 3, so that the last window is partial: 65 iterations in 5 epochs."""
    seed_everything(3)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=5 * epochs)
    trainer = create_trainer(
        model, optimizer, nn.functional.cross_entropy, amp=amp, accumulation_steps=3, clip_grad_norm=1.0, scheduler=schedule
    )
    dataset = NoisyDataset(40)
    loader = DataLoader(
        SeededDataset(dataset, seed=5) if seeded else dataset,
        batch_size=3,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        worker_init_fn=worker_init_fn,
    )
    assert len(loader) == 13
    ExponentialMovingAverage(0.9).attach(trainer)
    LRHistory().attach(trainer)
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy()})
    Evaluation(evaluator, DataLoader(NoisyDataset(12), batch_size=6, shuffle=True)).attach(trainer)
    EarlyStopping("val/accuracy", patience=50).attach(trainer)
    rotation = {} if every is None else {"every": every}
    CheckpointRotation(folder, metric="val/accuracy", keep_best=1, **rotation, **options).attach(trainer)
    return trainer, lambda: trainer.run(loader, max_epochs=epochs)


def make_small(folder, *, data, run=None, rotation=None, **options):
    """Makes a run of any data, with dropout and Adam."""
    seed_everything(4)
    model = network()
    trainer = create_trainer(model, torch.optim.Adam(model.parameters()), nn.functional.cross_entropy, **options)
    CheckpointRotation(folder, **(rotation or {})).attach(trainer)
    loader = data()
    return trainer, lambda: trainer.run(loader, **(run or {"max_epochs": 2}))
