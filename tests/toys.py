"""Small models, data and engines that the tests share."""

import os
from unittest import mock

import torch
from torch import nn

from camshaft import create_evaluator, create_trainer


def batches(number=3, size=4, dtype=torch.float32):
    """Returns ``number`` batches of ``size`` samples, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return [(draw(size, 3), draw(size, 2)) for _ in range(number)]


def linear(dtype=torch.float32):
    """Returns a linear model with the same weights on every call."""
    torch.manual_seed(7)
    return nn.Linear(3, 2, dtype=dtype)


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def data_parallel(model):
    """Returns ``nn.DataParallel`` as it is without a GPU: with one, it would move the model there."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        return nn.DataParallel(model)


def without_gpus():
    """Returns the environment for processes that train on the CPU with one thread, also if there is a GPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def trainer_of(model=None, optimizer=None, loss_fn=nn.functional.mse_loss, **options):
    """Returns a trainer, by default of a linear model with SGD."""
    model = linear() if model is None else model
    return create_trainer(model, sgd(model) if optimizer is None else optimizer, loss_fn, **options)


def model_of(trainer):
    return trainer.primary.module


def weights(module):
    """Copies every tensor of a module."""
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


def same(left, right):
    """Whether two lists of tensors are bit-identical."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def scripted(scores, name="score", events=None):
    """An engine that sets its metric ``name`` to the next of ``scores`` in each run, and then to the last one."""
    from ignite.engine import Events

    from camshaft.engines.loop import LoopEngine

    waiting = list(scores)
    engine = LoopEngine(lambda engine, batch: None)

    @engine.on(events or Events.COMPLETED)
    def score(engine):
        engine.state.metrics[name] = waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return engine


def evaluator_of(model, metrics=None, **options):
    return create_evaluator(model, metrics, **options)


def names_iteration(caught, number):
    """Whether a note of the exception names the iteration ``number``."""
    return any(f"iteration {number}" in note for note in caught.value.__notes__)


def collect(trainer, event, what):
    seen = []
    trainer.add_event_handler(event, lambda engine: seen.append(what(engine)))
    return seen
