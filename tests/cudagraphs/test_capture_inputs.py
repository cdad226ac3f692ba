"""Batches, gradients and optimizers of several kinds with `capture=True`."""

import copy
import dataclasses

import pytest
import torch
from captured_runs import RATE, assert_same, network, pairs, run
from fake_graphs import TapeRecorder
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


def test_too_many_forms_run_without_a_graph_and_say_so_once():
    data = pairs(tuple(range(2, 30)) + (6,) * 6)
    with pytest.warns(
        UserWarning, match=r"forward and backward pass of phase 'model' has more than 16 input signatures"
    ) as caught:
        found = run(True, data=data, epochs=2)
    assert len(caught) == 1
    assert same(run(False, data=data, epochs=2), found)
    assert TapeRecorder.made == 2


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_batches_that_train_different_parameters_in_turn(steps):
    def compute_loss(model, batch):
        hidden = model[2](model[1](model[0](batch["x"])))
        return cross_entropy(model[4](hidden), batch["y"]) if batch["task"] == "both" else hidden.square().mean()

    data = [{"x": x, "y": y, "task": task} for (x, y), task in zip(pairs((6,) * 8), ["both", "body"] * 4, strict=True)]
    options = {"loss_fn": None, "compute_loss": compute_loss, "data": data, "accumulation_steps": steps, "optimizer": "SGD"}
    expected, found = (run(capture, **options) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made > 1


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused"])
def test_parameters_whose_first_step_comes_late(optimizer):
    """Their optimizer state is made by it, and not by a graph that would make it anew each time."""

    def prepare(trainer):
        @trainer.on(StepEvents.GRADIENTS_READY)
        def keep_the_last_layer(engine):
            if engine.state.epoch == 1:
                for parameter in trainer.primary.module[4].parameters():
                    parameter.grad = None

    assert_same(2, prepare=prepare, optimizer=optimizer)


def test_a_loss_that_makes_the_gradients_of_others_too():
    model, judge = linear(), nn.Linear(2, 1)
    compute_loss = lambda m, batch: judge(m(batch[0])).mean()  # noqa: E731
    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss, capture=True)
    with pytest.raises(ValueError, match=r"gradients of a tensor of shape \(1,?.*, which no optimizer of phase"):
        trainer.run(batches(5))


@pytest.mark.filterwarnings("ignore:.* want a gradient and are in no optimizer")
def test_a_part_of_the_model_that_nobody_trains():
    model = network()
    made = SGD(model[4].parameters(), lr=RATE)
    with pytest.raises(ValueError, match=r"gradients of .*1\.bias.* and 1 more, which no optimizer .* trains. Freeze them"):
        create_trainer(model, made, cross_entropy, capture=True).run(pairs())


def test_the_state_has_the_loaders_tensors():
    data, seen = batches(8), []
    trainer = trainer_of(capture=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append((trainer.state.x, trainer.state.y)))
    trainer.run(data)
    assert all(x is given_x and y is given_y for (x, y), (given_x, given_y) in zip(seen, data, strict=True))


def test_other_named_losses_stay_as_they_are():
    trainer, seen = trainer_of(capture=True), []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: trainer.state.losses.update(mine=trainer.state.iteration))
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, lambda: seen.append(trainer.state.losses["mine"]))
    trainer.run(batches(8))
    assert seen == list(range(1, 9))


def test_batches_without_tensors():
    data = pairs()
    compute_loss = lambda model, index: cross_entropy(model(data[index][0]), data[index][1])  # noqa: E731
    assert_same(1 + 3, loss_fn=None, compute_loss=compute_loss, data=[0, 1, 2] * 2)


def test_values_that_are_equal_and_not_the_same():
    compute_loss = lambda model, batch: model(batch[0]).square().mean() * (0.5 if batch[1] is True else 0.25)  # noqa: E731
    (x, _), *_ = pairs()
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
def test_batches_of_different_forms(one, other):
    tensors = []
    assert signature(one, tensors) != signature(other, [])
    assert signature(one, []) == signature(copy.deepcopy(one), [])
    assert len(tensors) == len(list(all_tensors(one)))


def test_several_clippings():
    def prepare(trainer):
        GradientClipping(0.5, norm_type=1.0).attach(trainer)
        GradientClipping(0.5).attach(trainer, "second")
        GradientClipping(0.25).attach(trainer, "third")
        GradientClipping(clip_value=0.0625).attach(trainer, "fourth")

    assert_same(2 + 4, prepare=prepare)


def test_parameters_by_name():
    model = network()
    made = AdamW(model.named_parameters(), lr=RATE, fused=True, capturable=True)
    create_trainer(model, made, cross_entropy, capture=True).run(pairs())
    assert TapeRecorder.made == 2


def test_hooks_of_all_optimizers_are_called_at_each_step():
    calls = []
    hook = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        run(True, epochs=2)
    finally:
        hook.remove()
    assert (TapeRecorder.made, len(calls)) == (1, 14)


def test_what_a_graph_keeps_of_a_setting():
    setting = torch.tensor([0.5, 0.25])
    before = setting_key(setting)
    setting.fill_(1)
    assert before == (0.5, 0.25)
    assert setting_key(setting) == (1.0, 1.0)
    assert setting_key(["a"]) == "['a']"
    assert setting_key((0.9, 0.99)) == (0.9, 0.99)


def test_a_warm_up_of_a_rate_that_is_a_number_ends_in_a_graph():
    """Forms that came too seldom make room for those that stay."""

    def prepare(trainer):
        def warm_up(engine):
            engine.primary.optimizers[0].param_groups[0]["lr"] = RATE * min(1.0, engine.state.iteration / 32)

        trainer.add_event_handler(Events.ITERATION_STARTED, warm_up)

    with pytest.warns(UserWarning, match="the optimizer step of phase 'model' has more than 16 input signatures"):
        assert_same(2, prepare=prepare, optimizer="SGD", epochs=8)


def test_the_weight_of_a_batch_that_failed_is_not_counted():
    def compute_loss(model, batch):
        if batch[0].isnan().any():
            raise ZeroDivisionError
        return cross_entropy(model(batch[0]), batch[1])

    data = pairs((6, 4))
    data[1][0][0] = float("nan")
    weighed = []
    for capture in (False, True):
        model = network()
        options = {"compute_loss": compute_loss, "accumulation_steps": 4, "loss_weight": "samples"}
        trainer = create_trainer(model, sgd(model), None, capture=capture, **options)
        with pytest.raises(ZeroDivisionError):
            trainer.run(data)
        weighed.append(trainer.primary.window.weight)
    assert weighed == [6, 6]


@pytest.mark.parametrize("order", [(6, 4) * 4, (4, 6) * 4, (4,) * 8])
def test_gradients_of_others_are_found_in_whatever_order_batches_come(order):
    judge = nn.Linear(3, 3)

    def compute_loss(model, batch):
        x, y = batch
        return cross_entropy(judge(model(x)) if len(x) == 4 else model(x), y)

    with pytest.raises(ValueError, match="also computes gradients of"):
        run(True, loss_fn=None, compute_loss=compute_loss, data=pairs(order))


def test_sparse_batches():
    with pytest.raises(
        ValueError, match=r"a batch has a sparse or nested tensor of shape \(6, 4\), whose memory layout varies"
    ):
        run(True, data=[(x.to_sparse(), y) for x, y in pairs()], model_transform=None, loss_fn=cross_entropy)
