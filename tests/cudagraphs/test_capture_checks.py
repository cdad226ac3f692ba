"""Devices, models, optimizers, batches and losses that `capture=True` rejects."""

import random

import numpy as np
import pytest
import torch
from captured_runs import assert_same, pairs, run
from fake_graphs import TapeRecorder
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import AdamW
from toys import batches, linear, same, sgd, trainer_of

from camshaft import (
    Events,
    Handler,
    StepEvents,
    create_trainer,
    on,
)
from camshaft.cudagraphs import graphs as recordings


class Listens(Handler):
    @on(StepEvents.BACKWARD_STARTED)
    def listen(self, engine):
        """Never called."""


@pytest.mark.parametrize(
    "add",
    [
        lambda trainer: trainer.add_event_handler(StepEvents.FORWARD_COMPLETED, print),
        lambda trainer: trainer.on(StepEvents.BACKWARD_STARTED(every=10))(print),
        lambda trainer: trainer.on(StepEvents.GRADIENTS_READY | StepEvents.FORWARD_COMPLETED)(print),
        lambda trainer: trainer.on(StepEvents.FORWARD_COMPLETED(phase="model"))(print),
        lambda trainer: Listens().attach(trainer),
    ],
)
def test_nobody_listens_inside_a_graph(add):
    with pytest.raises(ValueError, match=r"(FORWARD_COMPLETED|BACKWARD_STARTED) is inside the CUDA graph of capture=True"):
        add(trainer_of(capture=True))


def test_a_device_without_graphs(monkeypatch):
    monkeypatch.delitem(recordings.CAPTURERS, "cpu")
    with pytest.raises(
        ValueError, match="capture=True records CUDA graphs: the model must be on a CUDA device, but it is on cpu"
    ):
        trainer_of(capture=True)


def test_an_argument_that_is_no_flag():
    with pytest.raises(TypeError, match="capture must be True or False, got 'graph'"):
        trainer_of(capture="graph")


def test_an_optimizer_that_was_not_made_for_it():
    model = linear()
    with pytest.raises(ValueError, match=r"make it with AdamW\(\.\.\., capturable=True\)"):
        trainer_of(model, AdamW(model.parameters()), capture=True)


def failing(loss_fn, data=None):
    trainer_of(loss_fn=loss_fn, capture=True).run(data or batches(5), max_epochs=2)


def test_a_loss_that_waits_for_the_device():
    with pytest.raises(
        RuntimeError, match=r"the forward and backward pass of phase 'model' can't be captured.*not permitted"
    ) as caught:
        failing(lambda y_pred, y: mse_loss(y_pred, y) * y_pred.max().item())
    assert "in epoch 1, iteration 4" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_a_loss_that_draws_on_the_host(draw):
    with pytest.raises(RuntimeError, match="draws random numbers on the host, which a graph would repeat"):
        failing(lambda y_pred, y: mse_loss(y_pred, y) * draw())


def test_a_batch_that_is_partly_elsewhere():
    trainer = trainer_of(capture=True, prepare_batch=lambda batch, **_: ((batch[0], torch.empty(2, device="meta")), batch[1]))
    trainer.primary.objective.model_transform = None
    trainer.primary.objective.model = lambda x: trainer.primary.module(x[0])
    with pytest.raises(ValueError, match=r"whole batch on cpu, but a tensor of shape \(2,\) is on meta"):
        trainer.run(batches(5))


def test_something_in_a_batch_that_cannot_be_compared():
    compute_loss = lambda model, batch: mse_loss(model(batch["x"]), batch["y"])  # noqa: E731
    model = linear()
    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss, capture=True)
    with pytest.raises(TypeError, match="a set in a batch can't be compared with that of the next; make it a tensor"):
        trainer.run([{"x": x, "y": y, "tags": {1}} for x, y in batches()])


def test_a_model_on_two_devices():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"capture=True is for a model on one device, but 1\.weight is on meta"):
        trainer_of(model, capture=True)


def test_one_group_of_the_optimizer_was_not_made_for_it():
    model = linear()
    groups = [{"params": [model.weight], "capturable": True}, {"params": [model.bias]}]
    with pytest.raises(ValueError, match=r"make it with AdamW\(\.\.\., capturable=True\)"):
        trainer_of(model, AdamW(groups, fused=True), capture=True)


def waits(y_pred, y):
    return mse_loss(y_pred, y) * y_pred.max().item()


def test_an_error_names_what_spoilt_the_recording_and_not_what_came_before():
    try:
        raise KeyError("some other trouble")
    except KeyError:
        with pytest.raises(RuntimeError, match="can't be captured as a CUDA graph: operation not permitted"):
            failing(waits)


class SpoiltTwice(TapeRecorder):
    """Where a recording fails, its end fails too."""

    def __call__(self, work):
        try:
            return super().__call__(work)
        except RuntimeError:
            raise RuntimeError("the end of a recording that was spoilt")  # noqa: B904


class Full(TapeRecorder):
    """A device whose memory gives out."""

    def __call__(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_the_end_of_a_recording_hides_nothing(monkeypatch):
    monkeypatch.setitem(recordings.CAPTURERS, "cpu", SpoiltTwice)
    with pytest.raises(RuntimeError, match="can't be captured as a CUDA graph: operation not permitted"):
        failing(waits)


def test_memory_that_gives_out_is_said_as_it_is(monkeypatch):
    monkeypatch.setitem(recordings.CAPTURERS, "cpu", Full)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        failing(mse_loss)


class Running(nn.Module):
    """Puts something new into one of its attributes at each pass."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.count, self.last = kind, 0, torch.zeros(2)
        self.register_buffer("mean", torch.zeros(2))
        self.layer = linear()

    def forward(self, x):
        y_pred = self.layer(x)
        if self.kind == "mean":
            self.mean = 0.5 * self.mean + 0.5 * y_pred.detach().mean(0)
        elif self.kind == "last":
            self.last = y_pred.detach()
        elif self.kind == "count":
            self.count += 1
        return y_pred


@pytest.mark.parametrize("kind", ["mean", "last", "count"])
def test_a_model_that_changes_other_than_in_place(kind):
    with pytest.raises(RuntimeError, match=rf"assigns something new to model\.{kind}, which a graph can't repeat. Change"):
        trainer_of(Running(kind), capture=True).run(batches(5))


def differentiated(model, batch):
    x = batch["x"].detach().requires_grad_(True)
    y_pred = model(x)
    (slope,) = torch.autograd.grad(y_pred.sum(), x, create_graph=True)
    return slope.square().mean() + cross_entropy(y_pred, batch["y"])


def test_an_objective_that_differentiates_its_inputs():
    smooth = lambda trainer: trainer.primary.module.__setitem__(2, nn.Tanh())  # noqa: E731
    options = {"loss_fn": None, "compute_loss": differentiated, "prepare": smooth}
    expected, found = (run(capture, data=[{"x": x, "y": y} for x, y in pairs()], **options) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made == 2


def test_inputs_that_a_gradient_is_made_of():
    assert_same(2, prepare_batch=lambda batch, **_: (batch[0].clone().requires_grad_(), batch[1]))


def test_an_input_made_by_something_that_is_trained():
    gain = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"prepare_batch returns a tensor of shape \(6, 4\) with an autograd graph"):
        run(True, prepare_batch=lambda batch, **_: (batch[0] * gain, batch[1]))


def test_a_model_that_cannot_be_recorded_is_as_it_was():
    model = Running("mean")
    trainer = trainer_of(model, capture=True)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(model.mean.clone()))
    with pytest.raises(RuntimeError, match="assigns something new"):
        trainer.run(batches(5))
    assert torch.equal(model.mean, seen[-1])
    assert all(p.grad is None for p in model.parameters())
