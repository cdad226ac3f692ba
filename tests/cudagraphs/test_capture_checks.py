"""Devices, models, optimizers, batches and losses that `capture=True` rejects."""

import random

import numpy as np
import pytest
import torch
from captured_runs import assert_same, labelled_batches, train
from fake_graphs import FakeCapturer
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
from camshaft.cudagraphs import graphs as graphs_module


class ListensInsideTheGraph(Handler):
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
        lambda trainer: ListensInsideTheGraph().attach(trainer),
    ],
)
def test_handlers_of_events_inside_a_graph_raise(add):
    with pytest.raises(ValueError, match=r"(FORWARD_COMPLETED|BACKWARD_STARTED) is inside the CUDA graph of capture=True"):
        add(trainer_of(capture=True))


def test_a_device_without_graphs_raises(monkeypatch):
    monkeypatch.delitem(graphs_module.CAPTURERS, "cpu")
    with pytest.raises(
        ValueError, match="capture=True records CUDA graphs: the model must be on a CUDA device, but it is on cpu"
    ):
        trainer_of(capture=True)


def test_an_argument_that_is_not_a_boolean_raises():
    with pytest.raises(TypeError, match="capture must be True or False, got 'graph'"):
        trainer_of(capture="graph")


def test_an_optimizer_without_capturable_raises():
    model = linear()
    with pytest.raises(ValueError, match=r"make it with AdamW\(\.\.\., capturable=True\)"):
        trainer_of(model, AdamW(model.parameters()), capture=True)


def run_captured(loss_fn, data=None):
    trainer_of(loss_fn=loss_fn, capture=True).run(data or batches(5), max_epochs=2)


def test_a_loss_that_synchronizes_with_the_device_raises():
    with pytest.raises(
        RuntimeError, match=r"the forward and backward pass of phase 'model' can't be captured.*not permitted"
    ) as caught:
        run_captured(lambda y_pred, y: mse_loss(y_pred, y) * y_pred.max().item())
    assert "in epoch 1, iteration 4" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_a_loss_that_draws_random_numbers_on_the_host_raises(draw):
    with pytest.raises(RuntimeError, match="draws random numbers on the host, which a graph would repeat"):
        run_captured(lambda y_pred, y: mse_loss(y_pred, y) * draw())


def test_a_batch_on_two_devices_raises():
    trainer = trainer_of(capture=True, prepare_batch=lambda batch, **_: ((batch[0], torch.empty(2, device="meta")), batch[1]))
    trainer.primary.objective.model_transform = None
    trainer.primary.objective.model = lambda x: trainer.primary.module(x[0])
    with pytest.raises(ValueError, match=r"whole batch on cpu, but a tensor of shape \(2,\) is on meta"):
        trainer.run(batches(5))


def test_a_batch_with_an_object_that_cannot_be_compared_raises():
    compute_loss = lambda model, batch: mse_loss(model(batch["x"]), batch["y"])  # noqa: E731
    model = linear()
    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss, capture=True)
    with pytest.raises(TypeError, match="a set in a batch can't be compared with that of the next; turn it into a tensor"):
        trainer.run([{"x": x, "y": y, "tags": {1}} for x, y in batches()])


def test_a_model_on_two_devices_raises():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"capture=True is for a model on one device, but 1\.weight is on meta"):
        trainer_of(model, capture=True)


def test_one_parameter_group_without_capturable_raises():
    model = linear()
    groups = [{"params": [model.weight], "capturable": True}, {"params": [model.bias]}]
    with pytest.raises(ValueError, match=r"make it with AdamW\(\.\.\., capturable=True\)"):
        trainer_of(model, AdamW(groups, fused=True), capture=True)


def synchronizing_loss(y_pred, y):
    return mse_loss(y_pred, y) * y_pred.max().item()


def test_an_error_names_the_cause_and_not_an_earlier_exception():
    try:
        raise KeyError("an earlier error")
    except KeyError:
        with pytest.raises(RuntimeError, match="can't be captured as a CUDA graph: operation not permitted"):
            run_captured(synchronizing_loss)


class FailsAtTheEndToo(FakeCapturer):
    """A capture that fails a second time when it ends after an error."""

    def __call__(self, work):
        try:
            return super().__call__(work)
        except RuntimeError:
            raise RuntimeError("the end of a failed capture")  # noqa: B904


class OutOfMemory(FakeCapturer):
    """A device that is out of memory."""

    def __call__(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_an_error_at_the_end_of_a_failed_capture_does_not_hide_the_cause(monkeypatch):
    monkeypatch.setitem(graphs_module.CAPTURERS, "cpu", FailsAtTheEndToo)
    with pytest.raises(RuntimeError, match="can't be captured as a CUDA graph: operation not permitted"):
        run_captured(synchronizing_loss)


def test_running_out_of_memory_raises_the_error_of_torch(monkeypatch):
    monkeypatch.setitem(graphs_module.CAPTURERS, "cpu", OutOfMemory)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        run_captured(mse_loss)


class ReplacesAttribute(nn.Module):
    """A model that replaces one of its attributes in each forward pass."""

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
def test_a_model_that_replaces_its_attributes_raises(kind):
    with pytest.raises(RuntimeError, match=rf"assigns something new to model\.{kind}, which a graph can't repeat. Change"):
        trainer_of(ReplacesAttribute(kind), capture=True).run(batches(5))


def loss_with_input_gradient(model, batch):
    x = batch["x"].detach().requires_grad_(True)
    y_pred = model(x)
    (slope,) = torch.autograd.grad(y_pred.sum(), x, create_graph=True)
    return slope.square().mean() + cross_entropy(y_pred, batch["y"])


def test_an_objective_may_differentiate_its_inputs():
    smooth = lambda trainer: trainer.primary.module.__setitem__(2, nn.Tanh())  # noqa: E731
    options = {"loss_fn": None, "compute_loss": loss_with_input_gradient, "prepare": smooth}
    expected, found = (
        train(capture, data=[{"x": x, "y": y} for x, y in labelled_batches()], **options) for capture in (False, True)
    )
    assert same(expected, found)
    assert FakeCapturer.captures == 2


def test_inputs_that_require_gradients_raise():
    assert_same(2, prepare_batch=lambda batch, **_: (batch[0].clone().requires_grad_(), batch[1]))


def test_inputs_computed_from_trainable_parameters_raise():
    gain = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"prepare_batch returns a tensor of shape \(6, 4\) with an autograd graph"):
        train(True, prepare_batch=lambda batch, **_: (batch[0] * gain, batch[1]))


def test_a_rejected_model_is_unchanged():
    model = ReplacesAttribute("mean")
    trainer = trainer_of(model, capture=True)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(model.mean.clone()))
    with pytest.raises(RuntimeError, match="assigns something new"):
        trainer.run(batches(5))
    assert torch.equal(model.mean, seen[-1])
    assert all(p.grad is None for p in model.parameters())
