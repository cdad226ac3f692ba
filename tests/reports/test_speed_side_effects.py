"""`explain(speed=True)` leaves the run as it was."""

import random
import re

import numpy as np
import pytest
import torch
from ignite.engine import Events
from speed_runs import FIGURE, game, picture_data, picture_trainer, said
from torch.utils.data import DataLoader
from toys import same, weights

from camshaft import GradientPenalty, StepEvents


def generators():
    _, keys, *rest = np.random.get_state()
    return random.getstate(), (keys.tolist(), *rest), torch.get_rng_state().tolist()


def everything(trainer):
    """All that a run leaves: weights, gradients, optimizer states, clocks and generators."""
    states, clocks = [], []
    for phase in trainer.phases.values():
        states += weights(phase.module) + [p.grad.clone() for p in phase.parameters() if p.grad is not None]
        for optimizer in phase.optimizers:
            states += [value.clone() for state in optimizer.state.values() for value in state.values()]
        clocks.append((phase.optimizer_step, phase.skipped_steps, phase.forward_passes, phase.window.batches))
    return states, (clocks, trainer.state.iteration, trainer.state.epoch), generators()


def assert_unchanged(before, after):
    assert same(before[0], after[0])
    assert before[1:] == after[1:]


def run_seeded(trainer, data):
    torch.manual_seed(11)
    trainer.run(data, max_epochs=2)
    return everything(trainer)


MOMENTS = (
    Events.STARTED,
    Events.GET_BATCH_COMPLETED(once=2),
    StepEvents.FORWARD_COMPLETED(once=2),
    StepEvents.BACKWARD_COMPLETED(once=3),
    StepEvents.GRADIENTS_READY(once=1),
    StepEvents.OPTIMIZER_STEP_COMPLETED(once=2),
    Events.EPOCH_COMPLETED(once=1),
)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.name)
def test_a_run_that_is_explained_ends_as_one_that_is_not(moment):
    explained, data = picture_trainer(accumulation_steps=2), DataLoader(picture_data(), 4, shuffle=True)
    texts = []
    explained.add_event_handler(moment, lambda engine: texts.append(said(engine)))
    assert_unchanged(run_seeded(picture_trainer(accumulation_steps=2), data), run_seeded(explained, data))
    assert len(texts) == 1


@pytest.mark.parametrize(
    "moment", [StepEvents.GRADIENTS_READY(once=2), StepEvents.BACKWARD_STARTED(once=2)], ids=lambda moment: moment.name
)
def test_a_gan_that_is_explained_ends_as_one_that_is_not(moment):
    data, explained = [torch.randn(3, 2) for _ in range(3)], game(penalty=GradientPenalty())
    explained.add_event_handler(moment, lambda engine: said(engine))
    assert_unchanged(run_seeded(game(penalty=GradientPenalty()), data), run_seeded(explained, data))


def test_nothing_is_changed_after_a_run():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4, shuffle=True))
    before, x = everything(trainer), trainer.state.x.clone()
    said(trainer)
    assert_unchanged(before, everything(trainer))
    assert torch.equal(trainer.state.x, x)


def test_nothing_is_changed_before_a_run():
    trainer = picture_trainer()
    before = everything(trainer)
    said(trainer)
    assert_unchanged(before, everything(trainer))


def test_it_can_be_asked_in_inference_mode():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4))
    with torch.inference_mode():
        text = said(trainer)
    assert len(re.findall(FIGURE, text)) >= 2
