"""Objectives: what a phase knows of a user's function."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from toys import batches, linear, sgd

from camshaft import Phase, Trainer
from camshaft.objective import FunctionObjective, Objective, as_objective
from camshaft.validation import name_of, stateful


def squares(engine, batch):
    return batch[0].square().mean()


class Squares:
    def __call__(self, engine, batch):
        return squares(engine, batch)


class LearnedScale(nn.Module):
    """A loss with a weight, and with an attribute that is no name for it."""

    def __init__(self):
        super().__init__()
        self.scale, self.label = nn.Parameter(torch.ones(())), torch.zeros(2)

    def forward(self, engine, batch):
        return self.scale.square() + engine.primary.module(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("function", "name"),
    [(squares, "squares"), (Squares(), "Squares"), (partial(squares, None), "squares"), (LearnedScale(), "LearnedScale")],
)
def test_a_function_is_named_in_messages(function, name):
    assert name_of(function) == as_objective(function).label == name


def test_a_function_becomes_an_objective_that_knows_nothing_else():
    objective = as_objective(squares)
    assert isinstance(objective, FunctionObjective)
    assert objective.loss_fn is squares
    assert stateful(objective) is None
    assert objective.inputs(None) is None
    assert (objective.has_penalties, objective.can_be_captured, objective.non_blocking) == (False, False, None)
    assert as_objective(objective) is objective


def test_an_objective_must_compute_the_loss():
    with pytest.raises(NotImplementedError):
        Objective()(None, None)


def test_the_weights_of_a_module_are_saved_with_the_phase():
    model, loss = linear(), LearnedScale()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    trainer = Trainer([Phase("model", model, optimizer, loss)])
    trainer.run(batches(2))
    assert trainer.checkpoint()["phases"]["model"]["objective"]["scale"].item() == pytest.approx(0.8**2)


def test_a_module_without_weights_has_no_state():
    assert stateful(as_objective(nn.MSELoss())) is None
    model = linear()
    trainer = Trainer([Phase("model", model, sgd(model), lambda engine, batch: model(batch[0]).mean())])
    assert "objective" not in trainer.checkpoint()["phases"]["model"]
