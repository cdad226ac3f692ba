"""Trains with and without graphs, and compares the results."""

import torch
from fake_graphs import FakeCapturer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adagrad, Adam, AdamW
from toys import same, weights

from camshaft import Events, create_trainer

LEARNING_RATE = 2.0**-5
"""A learning rate that is exact in every floating-point type."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def labelled_batches(sizes=(6,) * 7):
    generator = torch.Generator().manual_seed(1)
    draw = lambda size: torch.randn(size, 4, generator=generator)  # noqa: E731
    return [(draw(size), torch.randint(3, (size,), generator=generator)) for size in sizes]


OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=LEARNING_RATE, momentum=0.5, foreach=True),
    "SGD fused": lambda p: SGD(p, lr=LEARNING_RATE, momentum=0.5, nesterov=True, fused=True),
    "Adam fused": lambda p: Adam(p, lr=LEARNING_RATE, fused=True, capturable=True),
    "AdamW fused": lambda p: AdamW(p, lr=LEARNING_RATE, weight_decay=0.125, fused=True, capturable=True),
    "Adagrad": lambda p: Adagrad(p, lr=LEARNING_RATE),  # counts its steps on the host
}


def train(
    capture, *, optimizer="AdamW fused", data=None, epochs=6, prepare=lambda trainer: None, loss_fn=cross_entropy, **options
):
    """Trains a model. Returns everything that could differ: weights, optimizer state, losses, norms and outputs."""
    model = network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    if "scheduler" in options:
        options["scheduler"] = options["scheduler"](optimizer)
    trainer = create_trainer(model, optimizer, loss_fn, capture=capture, **options)
    seen = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def record(engine):
        state = engine.state
        seen.extend(x for x in (state.loss, state.grad_norm, state.y_pred, *state.losses.values()) if x is not None)

    prepare(trainer)
    torch.manual_seed(3)
    trainer.run(data or labelled_batches(), max_epochs=epochs)
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return weights(model) + moments + seen


def assert_same(graphs, **options):
    """Checks that a captured run equals one without graphs, and that it captures ``graphs`` graphs."""
    expected = train(False, **options)
    assert FakeCapturer.captures == 0
    found = train(True, **options)
    assert same(expected, found)
    assert graphs == FakeCapturer.captures
