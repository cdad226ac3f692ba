"""Which modules are in training mode during a run."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.nn.functional import mse_loss
from toys import batches, collect, sgd, trainer_of

from camshaft import (
    StepEvents,
    create_trainer,
)


def with_batch_norm():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_a_model_in_eval_mode_is_put_in_training_mode():
    model = with_batch_norm().eval()
    trainer = trainer_of(model)
    seen = collect(trainer, StepEvents.FORWARD_STARTED, lambda e: all(part.training for part in model.modules()))
    trainer.run(batches())
    assert seen == [True] * 3


def test_a_model_put_in_eval_mode_by_a_handler_trains_again():
    model = with_batch_norm()
    trainer = trainer_of(model)
    seen = collect(trainer, StepEvents.FORWARD_STARTED, lambda e: model.training)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: model.eval() and None)
    trainer.run(batches())
    assert seen == [True] * 3


@pytest.mark.parametrize("put_in_eval_by_a_handler", [False, True])
def test_a_frozen_batch_norm_stays_in_eval_mode(put_in_eval_by_a_handler):
    model = with_batch_norm()
    model[1].eval()
    trainer = trainer_of(model)
    modes = collect(trainer, StepEvents.FORWARD_STARTED, lambda e: [part.training for part in model.modules()])
    if put_in_eval_by_a_handler:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: model.eval() and None)
    trainer.run(batches(), max_epochs=2)
    assert modes == [[True, True, False, True, True]] * 6
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_batch_norm_frozen_after_the_trainer_was_created_stays_in_eval_mode():
    model = with_batch_norm()
    trainer = trainer_of(model)
    model[1].eval()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: model.eval() and None)
    trainer.run(batches())
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_submodules_in_eval_mode_stay_in_eval_mode():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    model[1].eval()
    trainer = create_trainer(model, sgd(model), mse_loss)
    model.eval()
    trainer.run(batches(3))
    assert [model.training, model[0].training, model[1].training, model[2].training] == [True, True, False, True]


def test_a_submodule_put_in_eval_mode_between_epochs_stays_in_eval_mode():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    trainer = create_trainer(model, sgd(model), mse_loss)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: model[1].eval())
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda: model.eval())
    trainer.run(batches(3), max_epochs=3)
    assert model.training
    assert not model[1].training
