"""A step on an accumulated window equals the step on a single large batch, for every weighting, data source and early end."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from camshaft import Events, StepEvents, create_trainer

IGNORED = -100
SIZES = (2, 5, 3, 4, 1, 6, 7)  # seven batches, which is not a multiple of 3 or 4
WEIGHTS = ("batch", "samples", "tokens")
PARTIAL = ("step", "drop")


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


SOURCES = {
    "list": lambda batches: batches,
    "stream": Stream,
    "loader": lambda batches: DataLoader(Stream(batches), batch_size=None),
}


def token_batches(sizes):
    """Sentences of four tokens. Between one and four tokens of each sentence are not masked."""
    batches = []
    for size in sizes:
        x, y = torch.randn(size, 4, 5, dtype=torch.float64), torch.randint(3, (size, 4))
        masked = torch.arange(4) > torch.randint(4, (size, 1))
        batches.append((x, y.masked_fill(masked, IGNORED)))
    return batches


def sizes_for(loss_weight):
    return SIZES if loss_weight != "batch" else (4,) * len(SIZES)


def count_tokens(batch):
    return int((batch[1] != IGNORED).sum())


def mean_over_tokens(y_pred, y):
    return cross_entropy(y_pred.flatten(0, 1), y.flatten(), ignore_index=IGNORED)


def mean_over_samples(y_pred, y):
    """The mean over sentences, which have the same weight regardless of their masked tokens."""
    y_pred, known = y_pred.log_softmax(-1), y != IGNORED
    picked = y_pred.gather(-1, y.clamp(min=0)[..., None])[..., 0] * known
    return -(picked.sum(1) / known.sum(1)).mean()


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6, dtype=torch.float64), nn.Tanh(), nn.Linear(6, 3, dtype=torch.float64))


def optimizer_of(name, model):
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def windows_of(batches, steps, partial_window):
    """The windows of one epoch, each as a single large batch."""
    parts = [batches[start : start + steps] for start in range(0, len(batches), steps)]
    windows = [part for part in parts if partial_window == "step" or len(part) == steps]
    return [tuple(torch.cat(tensors) for tensors in zip(*part, strict=True)) for part in windows]


def train_on(large_batches, loss_fn, optimizer="sgd"):
    """Trains in a plain loop without accumulation."""
    model = network()
    optimizer = optimizer_of(optimizer, model)
    for x, y in large_batches:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return list(model.parameters())


def accumulating(loss_weight, steps, optimizer="sgd", **options):
    """A trainer with accumulation of the same network, its loss function and its model."""
    model = network()
    loss_fn = mean_over_tokens if loss_weight == "tokens" else mean_over_samples
    loss_weight = count_tokens if loss_weight == "tokens" else loss_weight
    optimizer = optimizer_of(optimizer, model)
    trainer = create_trainer(model, optimizer, loss_fn, accumulation_steps=steps, loss_weight=loss_weight, **options)
    return trainer, loss_fn, model


def assert_same(model, expected):
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("partial_window", PARTIAL)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("steps", [3, 4, 5])
@pytest.mark.parametrize("loss_weight", WEIGHTS)
def test_a_window_equals_one_large_batch(loss_weight, steps, source, partial_window, optimizer):
    batches = token_batches(sizes_for(loss_weight))
    trainer, loss_fn, model = accumulating(loss_weight, steps, optimizer, partial_window=partial_window)
    state = trainer.run(SOURCES[source](batches), max_epochs=3)
    big = windows_of(batches, steps, partial_window) * 3
    assert state.optimizer_step == len(big)
    assert_same(model, train_on(big, loss_fn, optimizer))


@pytest.mark.parametrize("partial_window", PARTIAL)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loss_weight", WEIGHTS)
def test_a_window_ended_by_max_iters_equals_one_large_batch(loss_weight, source, partial_window):
    batches = token_batches(sizes_for(loss_weight))
    trainer, loss_fn, model = accumulating(loss_weight, 3, partial_window=partial_window)
    trainer.run(SOURCES[source](batches), max_iters=12)  # the fifth batch of the second epoch
    big = windows_of(batches, 3, partial_window) + windows_of(batches[:5], 3, partial_window)
    assert trainer.state.optimizer_step == len(big)
    assert_same(model, train_on(big, loss_fn))


@pytest.mark.parametrize("partial_window", PARTIAL)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loss_weight", WEIGHTS)
def test_a_window_ended_by_terminate_epoch_equals_one_large_batch(loss_weight, source, partial_window):
    batches = token_batches(sizes_for(loss_weight))
    trainer, loss_fn, model = accumulating(loss_weight, 3, partial_window=partial_window)

    @trainer.on(Events.ITERATION_COMPLETED(every=5))
    def leave_epoch():
        trainer.terminate_epoch()

    trainer.run(SOURCES[source](batches), max_epochs=2)
    big = windows_of(batches[:5], 3, partial_window) * 2
    assert trainer.state.optimizer_step == len(big)
    assert_same(model, train_on(big, loss_fn))


@pytest.mark.parametrize("loss_weight", WEIGHTS)
@pytest.mark.parametrize("partial_window", PARTIAL)
def test_a_window_ended_by_terminate_makes_no_step(loss_weight, partial_window):
    batches = token_batches(sizes_for(loss_weight))
    trainer, loss_fn, model = accumulating(loss_weight, 3, partial_window=partial_window)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), trainer.terminate)
    trainer.run(batches, max_epochs=2)
    assert (trainer.state.iteration, trainer.state.optimizer_step, trainer.window_is_open) == (5, 1, True)
    assert_same(model, train_on(windows_of(batches[:3], 3, "step"), loss_fn))


@pytest.mark.parametrize("loss_weight", WEIGHTS)
def test_a_custom_epoch_length_ends_the_window(loss_weight):
    batches = token_batches(sizes_for(loss_weight))
    trainer, loss_fn, model = accumulating(loss_weight, 3)
    trainer.run(batches, max_epochs=2, epoch_length=5)
    epochs = batches[:5], batches[5:] + batches[:3]
    assert_same(model, train_on([big for epoch in epochs for big in windows_of(epoch, 3, "step")], loss_fn))


@pytest.mark.parametrize(
    "weight_fn",
    [lambda batch: (batch[1] != IGNORED).sum(), lambda batch: count_tokens(batch) / 7.0],
    ids=["tensor", "fraction"],
)
def test_weights_may_be_tensors_and_are_normalized(weight_fn):
    batches, model = token_batches(SIZES), network()
    optimizer = optimizer_of("sgd", model)
    create_trainer(model, optimizer, mean_over_tokens, accumulation_steps=3, loss_weight=weight_fn).run(batches)
    assert_same(model, train_on(windows_of(batches, 3, "step"), mean_over_tokens))


def test_a_batch_of_weight_zero_has_no_effect():
    batches, model = token_batches((2, 5, 3)), network()
    optimizer = optimizer_of("sgd", model)
    weight_fn = lambda batch: len(batch[0]) % 5  # noqa: E731
    create_trainer(model, optimizer, mean_over_samples, accumulation_steps=3, loss_weight=weight_fn).run(batches)
    assert_same(model, train_on(windows_of([batches[0], batches[2]], 2, "step"), mean_over_samples))


@pytest.mark.parametrize("loss_weight", WEIGHTS)
def test_the_gradient_at_gradients_ready_equals_that_of_a_large_batch(loss_weight):
    batches = token_batches(sizes_for(loss_weight)[:3])
    trainer, loss_fn, model = accumulating(loss_weight, 4)  # the stream ends before the window is full
    seen = []

    @trainer.on(StepEvents.GRADIENTS_READY)
    def keep():
        seen.extend(parameter.grad.clone() for parameter in model.parameters())

    trainer.run(Stream(batches))
    model = network()
    (big,) = windows_of(batches, 3, "step")
    loss_fn(model(big[0]), big[1]).backward()
    torch.testing.assert_close(seen, [parameter.grad for parameter in model.parameters()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_weight", WEIGHTS)
def test_gradients_of_a_dropped_window_are_discarded(loss_weight):
    batches = token_batches(sizes_for(loss_weight))
    trainer, loss_fn, model = accumulating(loss_weight, 4, partial_window="drop")
    grads = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: grads.extend(p.grad for p in model.parameters()))
    trainer.run(Stream(batches), max_epochs=2)
    assert grads == [None] * 8
    assert_same(model, train_on(windows_of(batches, 4, "drop") * 2, loss_fn))
