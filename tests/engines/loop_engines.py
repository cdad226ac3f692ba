"""The engines that share the loop: the bare loop and the trainer."""

import torch

from camshaft import create_trainer
from camshaft.engines.loop import LoopEngine


def make_loop():
    return LoopEngine(lambda engine, batch: batch)


def make_trainer():
    """A trainer that accepts any batch, including ``None``."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return create_trainer(model, optimizer, None, compute_loss=lambda model, batch: model(torch.ones(1, 1)).sum())


MAKERS = {"loop": make_loop, "trainer": make_trainer}
