"""Batches, gradients and optimizers of several kinds with `capture=True`."""

import copy
import dataclasses

import pytest
import torch
from captured_runs import LEARNING_RATE, assert_same, labelled_batches, network, train
from fake_graphs import FakeCapturer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook
from toys import batches, linear, same, sgd, trainer_of

from camshaft import (
    Events,
    GradientClipping,
    StepEvents,
    create_trainer,
)
from camshaft.cudagraphs.checks import setting_key
from camshaft.pytree import signature
from camshaft.pytree import tensors as all_tensors


def test_too_many_input_signatures_run_without_a_graph_and_warn_once():
    data = labelled_batches(tuple(range(2, 30)) + (6,) * 6)
    with pytest.warns(
        UserWarning, match=r"forward and backward pass of phase 'model' has more than 16 input signatures"
    ) as caught:
        found = train(True, data=data, epochs=2)
    assert len(caught) == 1
    assert same(train(False, data=data, epochs=2), found)
    assert FakeCapturer.captures == 2


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_batches_may_train_different_parameters_in_turn(steps):
    def compute_loss(model, batch):
        hidden = model[2](model[1](model[0](batch["x"])))
        return cross_entropy(model[4](hidden), batch["y"]) if batch["task"] == "both" else hidden.square().mean()

    data = [
        {"x": x, "y": y, "task": task} for (x, y), task in zip(labelled_batches((6,) * 8), ["both", "body"] * 4, strict=True)
    ]
    options = {"loss_fn": None, "compute_loss": compute_loss, "data": data, "accumulation_steps": steps, "optimizer": "SGD"}
    expected, found = (train(capture, **options) for capture in (False, True))
    assert same(expected, found)
    assert FakeCapturer.captures > 1


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused"])
def test_the_first_step_of_a_parameter_may_come_late(optimizer):
    """The optimizer state is created by an eager step, not inside a graph, which would create it at each replay."""

    def prepare(trainer):
        @trainer.on(StepEvents.GRADIENTS_READY)
        def keep_the_last_layer(engine):
            if engine.state.epoch == 1:
                for parameter in trainer.primary.module[4].parameters():
                    parameter.grad = None

    assert_same(2, prepare=prepare, optimizer=optimizer)


def test_gradients_of_parameters_outside_the_model_raise():
    model, head = linear(), nn.Linear(2, 1)
    compute_loss = lambda m, batch: head(m(batch[0])).mean()  # noqa: E731
    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss, capture=True)
    with pytest.raises(ValueError, match=r"gradients of a tensor of shape \(1,?.*, which no optimizer of phase"):
        trainer.run(batches(5))


@pytest.mark.filterwarnings("ignore:.* require gradients but are in no optimizer")
def test_a_submodule_without_an_optimizer_raises():
    model = network()
    optimizer = SGD(model[4].parameters(), lr=LEARNING_RATE)
    with pytest.raises(ValueError, match=r"gradients of .*1\.bias.* and 1 more, which no optimizer .* trains. Freeze them"):
        create_trainer(model, optimizer, cross_entropy, capture=True).run(labelled_batches())


def test_the_state_has_the_tensors_of_the_loader():
    data, seen = batches(8), []
    trainer = trainer_of(capture=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append((trainer.state.x, trainer.state.y)))
    trainer.run(data)
    assert all(x is given_x and y is given_y for (x, y), (given_x, given_y) in zip(seen, data, strict=True))


def test_other_named_losses_are_unchanged():
    trainer, seen = trainer_of(capture=True), []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: trainer.state.losses.update(mine=trainer.state.iteration))
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, lambda: seen.append(trainer.state.losses["mine"]))
    trainer.run(batches(8))
    assert seen == list(range(1, 9))


def test_batches_may_contain_no_tensors():
    data = labelled_batches()
    compute_loss = lambda model, index: cross_entropy(model(data[index][0]), data[index][1])  # noqa: E731
    assert_same(1 + 3, loss_fn=None, compute_loss=compute_loss, data=[0, 1, 2] * 2)


def test_equal_values_of_different_types_are_distinguished():
    compute_loss = lambda model, batch: model(batch[0]).square().mean() * (0.5 if batch[1] is True else 0.25)  # noqa: E731
    (x, _), *_ = labelled_batches()
    assert_same(4, loss_fn=None, compute_loss=compute_loss, data=[(x, True), (x, 1), (x, 1.0)] * 2)


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    weight: int = 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, 3), torch.zeros(3, 2).T),
        (torch.zeros(2, 3), torch.zeros(2, 3).double()),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")),
        (torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)),
        (torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3)),
        ([torch.zeros(2)], (torch.zeros(2),)),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        (Sample(torch.zeros(2)), Sample(torch.zeros(2), 2)),
        (Sample(torch.zeros(2)), Sample(torch.zeros(3))),
        (1, 1.0),
        ("a", None),
    ],
    ids=str,
)
def test_different_batches_have_different_signatures(one, other):
    tensors = []
    assert signature(one, tensors) != signature(other, [])
    assert signature(one, []) == signature(copy.deepcopy(one), [])
    assert len(tensors) == len(list(all_tensors(one)))


def test_several_clipping_handlers():
    def prepare(trainer):
        GradientClipping(0.5, norm_type=1.0).attach(trainer)
        GradientClipping(0.5).attach(trainer, "second")
        GradientClipping(0.25).attach(trainer, "third")
        GradientClipping(clip_value=0.0625).attach(trainer, "fourth")

    assert_same(2 + 4, prepare=prepare)


def test_an_optimizer_with_named_parameters():
    model = network()
    optimizer = AdamW(model.named_parameters(), lr=LEARNING_RATE, fused=True, capturable=True)
    create_trainer(model, optimizer, cross_entropy, capture=True).run(labelled_batches())
    assert FakeCapturer.captures == 2


def test_global_optimizer_hooks_are_called_at_each_step():
    calls = []
    hook = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        train(True, epochs=2)
    finally:
        hook.remove()
    assert (FakeCapturer.captures, len(calls)) == (1, 14)


def test_a_setting_key_is_a_copy_of_the_value():
    setting = torch.tensor([0.5, 0.25])
    before = setting_key(setting)
    setting.fill_(1)
    assert before == (0.5, 0.25)
    assert setting_key(setting) == (1.0, 1.0)
    assert setting_key(["a"]) == "['a']"
    assert setting_key((0.9, 0.99)) == (0.9, 0.99)


def test_a_graph_is_captured_after_a_learning_rate_warm_up():
    """Rare input signatures make room for those that are used often."""

    def prepare(trainer):
        def warm_up(engine):
            engine.primary.optimizers[0].param_groups[0]["lr"] = LEARNING_RATE * min(1.0, engine.state.iteration / 32)

        trainer.add_event_handler(Events.ITERATION_STARTED, warm_up)

    with pytest.warns(UserWarning, match="the optimizer step of phase 'model' has more than 16 input signatures"):
        assert_same(2, prepare=prepare, optimizer="SGD", epochs=8)


def test_the_weight_of_a_failed_batch_is_not_added():
    def compute_loss(model, batch):
        if batch[0].isnan().any():
            raise ZeroDivisionError
        return cross_entropy(model(batch[0]), batch[1])

    data = labelled_batches((6, 4))
    data[1][0][0] = float("nan")
    window_weights = []
    for capture in (False, True):
        model = network()
        options = {"compute_loss": compute_loss, "accumulation_steps": 4, "loss_weight": "samples"}
        trainer = create_trainer(model, sgd(model), None, capture=capture, **options)
        with pytest.raises(ZeroDivisionError):
            trainer.run(data)
        window_weights.append(trainer.primary.window.weight)
    assert window_weights == [6, 6]


@pytest.mark.parametrize("order", [(6, 4) * 4, (4, 6) * 4, (4,) * 8])
def test_gradients_outside_the_model_are_detected_for_any_order_of_batches(order):
    head = nn.Linear(3, 3)

    def compute_loss(model, batch):
        x, y = batch
        return cross_entropy(head(model(x)) if len(x) == 4 else model(x), y)

    with pytest.raises(ValueError, match="also computes gradients of"):
        train(True, loss_fn=None, compute_loss=compute_loss, data=labelled_batches(order))


def test_sparse_batches_raise():
    with pytest.raises(
        ValueError, match=r"a batch has a sparse or nested tensor of shape \(6, 4\), whose memory layout varies"
    ):
        train(True, data=[(x.to_sparse(), y) for x, y in labelled_batches()], model_transform=None, loss_fn=cross_entropy)
