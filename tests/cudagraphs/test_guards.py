"""Graphs are captured again when what they depend on has changed."""

import copy
import random

import numpy as np
import pytest
import torch
from captured_runs import OPTIMIZERS, RATE, assert_same, network, pairs, run
from fake_graphs import TapeRecorder
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
from camshaft.cudagraphs import graphs as recordings


def moves_weights(trainer):
    for parameter in trainer.primary.parameters():
        parameter.data = parameter.data.clone()


def loads_the_optimizer(trainer):
    optimizer = trainer.primary.optimizers[0]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def forgets_its_moments(trainer):
    trainer.primary.optimizers[0].state.clear()


def keeps_its_statistics(trainer):
    trainer.primary.module[1].eval()


def takes_less_precision(trainer):
    MixedPrecision("bf16").attach(trainer)


@pytest.mark.parametrize(
    ("change", "graphs"),
    [
        (moves_weights, 4),
        (loads_the_optimizer, 4),
        (forgets_its_moments, 4),
        (keeps_its_statistics, 4),
        (takes_less_precision, 3),
    ],
)
@pytest.mark.parametrize("moment", [Events.EPOCH_STARTED(once=3), Events.ITERATION_COMPLETED(once=17)], ids=["epoch", "batch"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused"])
def test_graphs_of_what_has_changed_are_made_anew(change, graphs, moment, optimizer):
    prepare = lambda trainer: trainer.add_event_handler(moment, change)  # noqa: E731
    assert_same(graphs, prepare=prepare, optimizer=optimizer)


class Scaled(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.factors, self.unknown = [1.0, {"of": 1.0}], float("nan")

    def forward(self, x):
        return super().forward(x) * self.factors[0]


class Smoothing(nn.CrossEntropyLoss):
    def forward(self, y_pred, y):
        return super().forward(y_pred, y) * (1.0 if self.training else 0.5)


def drops_nothing(trainer):
    trainer.primary.module[3].p = 0.0


def has_a_hook(trainer):
    trainer.primary.module[2].register_forward_hook(lambda module, inputs, output: output * 0.5)


def has_another_layer(trainer):
    trainer.primary.module.add_module("another", nn.Softplus())


def has_another_buffer(trainer):
    trainer.primary.module[1].running_mean = torch.ones(8)


def weighs_the_classes(trainer):
    trainer.primary.objective.loss_fn.weight = torch.tensor([0.5, 1.0, 2.0])


def smooths_the_labels(trainer):
    trainer.primary.objective.loss_fn.label_smoothing = 0.25


def squashes_otherwise(trainer):
    trainer.primary.module[2] = nn.Tanh()


def masks_a_gradient(trainer):
    trainer.primary.module[4].weight.register_hook(lambda gradient: gradient * 0.5)


def looks_at_gradients_afterwards(trainer):
    def halve(parameter):
        parameter.grad.mul_(0.5)

    trainer.primary.module[4].weight.register_post_accumulate_grad_hook(halve)


def has_another_loss(trainer):
    trainer.primary.objective.loss_fn = nn.functional.multi_margin_loss


def evaluates_the_loss(trainer):
    trainer.primary.objective.loss_fn.eval()


def is_put_into_a_list(trainer):
    trainer.primary.module[2].factors[0] = 0.5


@pytest.mark.parametrize(
    "change",
    [
        drops_nothing,
        has_a_hook,
        has_another_layer,
        has_another_buffer,
        weighs_the_classes,
        smooths_the_labels,
        squashes_otherwise,
        masks_a_gradient,
        looks_at_gradients_afterwards,
        has_another_loss,
        evaluates_the_loss,
        is_put_into_a_list,
    ],
)
def test_graphs_are_made_anew_where_a_setting_has_changed_between_epochs(change):
    def prepare(trainer):
        trainer.primary.module[2] = Scaled()
        trainer.add_event_handler(Events.EPOCH_STARTED(once=3), change)

    expected, found = (run(capture, prepare=prepare, loss_fn=Smoothing()) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made == 4


def test_graphs_that_are_thrown_away_over_and_over_are_warned_of():
    prepare = lambda trainer: trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), moves_weights)  # noqa: E731
    expected = run(False, prepare=prepare, epochs=10)
    with pytest.warns(
        UserWarning, match="invalidated 10 times, most recently because a parameter or a gradient has moved"
    ) as caught:
        found = run(True, prepare=prepare, epochs=10)
    assert len(caught) == 1
    assert same(expected, found)


def test_a_network_that_is_evaluated_between_epochs_keeps_its_graphs():
    prepare = lambda trainer: trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: trainer.primary.module.eval())  # noqa: E731
    assert_same(2, prepare=prepare)


def test_another_run_goes_on_with_the_graphs():
    trainer = trainer_of(capture=True)
    trainer.run(batches(5), max_epochs=2)
    made = TapeRecorder.made
    trainer.run(batches(5), max_epochs=2)
    assert (made, TapeRecorder.made) == (2, 2)
    assert TapeRecorder.replays == 2 * (20 - 3)


def test_an_earlier_state_is_restored_in_the_same_process():
    model = network()
    trainer = create_trainer(model, OPTIMIZERS["AdamW fused"](model.parameters()), cross_entropy, capture=True)
    seed_everything(1)
    trainer.run(pairs(), max_epochs=2)
    saved = copy.deepcopy(trainer.checkpoint())
    ends = []
    for _ in range(2):
        trainer.restore(copy.deepcopy(saved))
        trainer.run(pairs(), max_epochs=4)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.filterwarnings("ignore:capture=True")
def test_a_checkpoint_of_a_run_without_graphs(tmp_path):
    def trainer_over(capture):
        model = network()
        made = AdamW(model.parameters(), lr=RATE, fused=True, capturable=capture)
        return create_trainer(model, made, cross_entropy, capture=capture), made

    seed_everything(1)
    first, _ = trainer_over(False)
    checkpoints = CheckpointRotation(tmp_path).attach(first)
    first.run(pairs(), max_epochs=1)
    path = checkpoints.save()
    first.run(pairs(), max_epochs=3)
    second, made = trainer_over(True)
    CheckpointRotation(tmp_path).attach(second).resume(path)
    second.run(pairs(), max_epochs=3)
    assert made.param_groups[0]["capturable"] is True
    assert TapeRecorder.made == 2
    assert same(weights(first.primary.module), weights(second.primary.module))


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)], ids=["python", "numpy", "torch"])
def test_the_generators_of_the_host(draw):
    before = recordings.host_generators()
    assert recordings.host_generators() == before
    draw()
    assert recordings.host_generators() != before


def test_an_interrupted_run_goes_on_with_what_has_changed_meanwhile():
    def go(capture):
        model = network()
        trainer = create_trainer(model, OPTIMIZERS["SGD"](model.parameters()), cross_entropy, capture=capture)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), trainer.interrupt)
        torch.manual_seed(3)
        trainer.run(pairs(), max_epochs=4)
        model[3].p = 0.0
        trainer.run(pairs(), max_epochs=4)
        return weights(model)

    assert same(go(False), go(True))
    assert TapeRecorder.made == 4
