"""`explain(speed=True)` leaves the run as it was."""

import random
import re

import numpy as np
import pytest
import torch
from ignite.engine import Events
from speed_runs import MEASUREMENT, picture_data, picture_trainer, small_gan, speed_report
from torch.utils.data import DataLoader
from toys import same, weights

from camshaft import GradientPenalty, StepEvents


def generator_states():
    _, keys, *rest = np.random.get_state()
    return random.getstate(), (keys.tolist(), *rest), torch.get_rng_state().tolist()


def full_state(trainer):
    """Everything that a run changes: weights, gradients, optimizer states, clocks and random states."""
    states, clocks = [], []
    for phase in trainer.phases.values():
        states += weights(phase.module) + [p.grad.clone() for p in phase.parameters() if p.grad is not None]
        for optimizer in phase.optimizers:
            states += [value.clone() for state in optimizer.state.values() for value in state.values()]
        clocks.append((phase.optimizer_step, phase.skipped_steps, phase.forward_passes, phase.window.batches))
    return states, (clocks, trainer.state.iteration, trainer.state.epoch), generator_states()


def assert_unchanged(before, after):
    assert same(before[0], after[0])
    assert before[1:] == after[1:]


def run_seeded(trainer, data):
    torch.manual_seed(11)
    trainer.run(data, max_epochs=2)
    return full_state(trainer)


EVENTS = (
    Events.STARTED,
    Events.GET_BATCH_COMPLETED(once=2),
    StepEvents.FORWARD_COMPLETED(once=2),
    StepEvents.BACKWARD_COMPLETED(once=3),
    StepEvents.GRADIENTS_READY(once=1),
    StepEvents.OPTIMIZER_STEP_COMPLETED(once=2),
    Events.EPOCH_COMPLETED(once=1),
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_explaining_during_a_run_does_not_change_it(event):
    explained, data = picture_trainer(accumulation_steps=2), DataLoader(picture_data(), 4, shuffle=True)
    texts = []
    explained.add_event_handler(event, lambda engine: texts.append(speed_report(engine)))
    assert_unchanged(run_seeded(picture_trainer(accumulation_steps=2), data), run_seeded(explained, data))
    assert len(texts) == 1


@pytest.mark.parametrize(
    "event", [StepEvents.GRADIENTS_READY(once=2), StepEvents.BACKWARD_STARTED(once=2)], ids=lambda event: event.name
)
def test_explaining_during_a_gan_run_does_not_change_it(event):
    data, explained = [torch.randn(3, 2) for _ in range(3)], small_gan(penalty=GradientPenalty())
    explained.add_event_handler(event, lambda engine: speed_report(engine))
    assert_unchanged(run_seeded(small_gan(penalty=GradientPenalty()), data), run_seeded(explained, data))


def test_explaining_after_a_run_changes_nothing():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4, shuffle=True))
    before, x = full_state(trainer), trainer.state.x.clone()
    speed_report(trainer)
    assert_unchanged(before, full_state(trainer))
    assert torch.equal(trainer.state.x, x)


def test_explaining_before_a_run_changes_nothing():
    trainer = picture_trainer()
    before = full_state(trainer)
    speed_report(trainer)
    assert_unchanged(before, full_state(trainer))


def test_explain_works_in_inference_mode():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4))
    with torch.inference_mode():
        text = speed_report(trainer)
    assert len(re.findall(MEASUREMENT, text)) >= 2
