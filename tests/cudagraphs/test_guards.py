"""Graphs are captured again when what they depend on has changed."""

import copy
import random

import numpy as np
import pytest
import torch
from captured_runs import LEARNING_RATE, OPTIMIZERS, assert_same, labelled_batches, network, train
from fake_graphs import FakeCapturer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from toys import batches, same, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    Events,
    MixedPrecision,
    create_trainer,
    seed_everything,
)
from camshaft.cudagraphs import graphs as graphs_module


def move_weights(trainer):
    for parameter in trainer.primary.parameters():
        parameter.data = parameter.data.clone()


def load_optimizer_state(trainer):
    optimizer = trainer.primary.optimizers[0]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def clear_optimizer_state(trainer):
    trainer.primary.optimizers[0].state.clear()


def freeze_batch_norm_statistics(trainer):
    trainer.primary.module[1].eval()


def use_bf16(trainer):
    MixedPrecision("bf16").attach(trainer)


@pytest.mark.parametrize(
    ("change", "graphs"),
    [
        (move_weights, 4),
        (load_optimizer_state, 4),
        (clear_optimizer_state, 4),
        (freeze_batch_norm_statistics, 4),
        (use_bf16, 3),
    ],
)
@pytest.mark.parametrize("moment", [Events.EPOCH_STARTED(once=3), Events.ITERATION_COMPLETED(once=17)], ids=["epoch", "batch"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused"])
def test_graphs_are_captured_again_after_a_change(change, graphs, moment, optimizer):
    prepare = lambda trainer: trainer.add_event_handler(moment, change)  # noqa: E731
    assert_same(graphs, prepare=prepare, optimizer=optimizer)


class ScaledReLU(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.factors, self.unknown = [1.0, {"of": 1.0}], float("nan")

    def forward(self, x):
        return super().forward(x) * self.factors[0]


class ModeDependentLoss(nn.CrossEntropyLoss):
    def forward(self, y_pred, y):
        return super().forward(y_pred, y) * (1.0 if self.training else 0.5)


def disable_dropout(trainer):
    trainer.primary.module[3].p = 0.0


def add_forward_hook(trainer):
    trainer.primary.module[2].register_forward_hook(lambda module, inputs, output: output * 0.5)


def add_layer(trainer):
    trainer.primary.module.add_module("another", nn.Softplus())


def replace_buffer(trainer):
    trainer.primary.module[1].running_mean = torch.ones(8)


def set_class_weights(trainer):
    trainer.primary.objective.loss_fn.weight = torch.tensor([0.5, 1.0, 2.0])


def set_label_smoothing(trainer):
    trainer.primary.objective.loss_fn.label_smoothing = 0.25


def replace_activation(trainer):
    trainer.primary.module[2] = nn.Tanh()


def add_gradient_hook(trainer):
    trainer.primary.module[4].weight.register_hook(lambda gradient: gradient * 0.5)


def add_post_accumulate_hook(trainer):
    def halve(parameter):
        parameter.grad.mul_(0.5)

    trainer.primary.module[4].weight.register_post_accumulate_grad_hook(halve)


def replace_loss_fn(trainer):
    trainer.primary.objective.loss_fn = nn.functional.multi_margin_loss


def put_loss_in_eval_mode(trainer):
    trainer.primary.objective.loss_fn.eval()


def change_list_item(trainer):
    trainer.primary.module[2].factors[0] = 0.5


@pytest.mark.parametrize(
    "change",
    [
        disable_dropout,
        add_forward_hook,
        add_layer,
        replace_buffer,
        set_class_weights,
        set_label_smoothing,
        replace_activation,
        add_gradient_hook,
        add_post_accumulate_hook,
        replace_loss_fn,
        put_loss_in_eval_mode,
        change_list_item,
    ],
)
def test_graphs_are_captured_again_after_a_setting_changed_between_epochs(change):
    def prepare(trainer):
        trainer.primary.module[2] = ScaledReLU()
        trainer.add_event_handler(Events.EPOCH_STARTED(once=3), change)

    expected, found = (train(capture, prepare=prepare, loss_fn=ModeDependentLoss()) for capture in (False, True))
    assert same(expected, found)
    assert FakeCapturer.captures == 4


def test_repeated_invalidation_of_graphs_gives_a_warning():
    prepare = lambda trainer: trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), move_weights)  # noqa: E731
    expected = train(False, prepare=prepare, epochs=10)
    with pytest.warns(
        UserWarning, match="invalidated 10 times, most recently because a parameter or a gradient has moved"
    ) as caught:
        found = train(True, prepare=prepare, epochs=10)
    assert len(caught) == 1
    assert same(expected, found)


def test_evaluating_the_model_between_epochs_keeps_the_graphs():
    prepare = lambda trainer: trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: trainer.primary.module.eval())  # noqa: E731
    assert_same(2, prepare=prepare)


def test_another_run_reuses_the_graphs():
    trainer = trainer_of(capture=True)
    trainer.run(batches(5), max_epochs=2)
    captures = FakeCapturer.captures
    trainer.run(batches(5), max_epochs=2)
    assert (captures, FakeCapturer.captures) == (2, 2)
    assert FakeCapturer.replays == 2 * (20 - 3)


def test_an_earlier_state_can_be_restored_in_the_same_process():
    model = network()
    trainer = create_trainer(model, OPTIMIZERS["AdamW fused"](model.parameters()), cross_entropy, capture=True)
    seed_everything(1)
    trainer.run(labelled_batches(), max_epochs=2)
    saved = copy.deepcopy(trainer.checkpoint())
    ends = []
    for _ in range(2):
        trainer.restore(copy.deepcopy(saved))
        trainer.run(labelled_batches(), max_epochs=4)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.filterwarnings("ignore:capture=True")
def test_a_checkpoint_of_a_run_without_graphs_is_resumed_with_graphs(tmp_path):
    def trainer_over(capture):
        model = network()
        optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, capturable=capture)
        return create_trainer(model, optimizer, cross_entropy, capture=capture), optimizer

    seed_everything(1)
    first, _ = trainer_over(False)
    checkpoints = CheckpointRotation(tmp_path).attach(first)
    first.run(labelled_batches(), max_epochs=1)
    path = checkpoints.save()
    first.run(labelled_batches(), max_epochs=3)
    second, optimizer = trainer_over(True)
    CheckpointRotation(tmp_path).attach(second).resume(path)
    second.run(labelled_batches(), max_epochs=3)
    assert optimizer.param_groups[0]["capturable"] is True
    assert FakeCapturer.captures == 2
    assert same(weights(first.primary.module), weights(second.primary.module))


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)], ids=["python", "numpy", "torch"])
def test_a_draw_changes_the_state_of_the_host_generators(draw):
    before = graphs_module.host_generators()
    assert graphs_module.host_generators() == before
    draw()
    assert graphs_module.host_generators() != before


def test_changes_during_an_interruption_take_effect():
    def train_with(capture):
        model = network()
        trainer = create_trainer(model, OPTIMIZERS["SGD"](model.parameters()), cross_entropy, capture=capture)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), trainer.interrupt)
        torch.manual_seed(3)
        trainer.run(labelled_batches(), max_epochs=4)
        model[3].p = 0.0
        trainer.run(labelled_batches(), max_epochs=4)
        return weights(model)

    assert same(train_with(False), train_with(True))
    assert FakeCapturer.captures == 4
