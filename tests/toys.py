"""The smallest real things to train: a linear model, three batches, and an engine over them."""

import torch
from torch import nn

from camshaft import create_evaluator, create_trainer


def batches(number=3, size=4, dtype=torch.float32):
    """The same ``number`` batches of ``size`` samples at every call."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return [(draw(size, 3), draw(size, 2)) for _ in range(number)]


def linear(dtype=torch.float32):
    """The same linear model at every call."""
    torch.manual_seed(7)
    return nn.Linear(3, 2, dtype=dtype)


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def trainer_of(model=None, optimizer=None, loss_fn=nn.functional.mse_loss, **options):
    """A trainer over a linear model with SGD, unless told otherwise."""
    model = linear() if model is None else model
    return create_trainer(model, sgd(model) if optimizer is None else optimizer, loss_fn, **options)


def model_of(trainer):
    return trainer.primary.module


def weights(module):
    """A copy of every tensor of a module, so that it can be compared later."""
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


def same(left, right):
    """Whether two lists of tensors are equal bit for bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def scripted(scores, name="score", events=None):
    """An evaluator whose metric ``name`` takes the values of ``scores`` one after the other, the last one for ever."""
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
    """Whether the notes of an exception name the iteration in which it was raised."""
    return any(f"iteration {number}" in note for note in caught.value.__notes__)


def collect(trainer, event, what):
    seen = []
    trainer.add_event_handler(event, lambda engine: seen.append(what(engine)))
    return seen
