"""Metrics attached to the trainer are whole after a resume in mid-epoch, or said to be partial."""

from functools import partial

import pytest
from ignite.engine import Events
from ignite.metrics import Average, Metric, RunningAverage
from runs import Noisy, make_small
from torch.utils.data import DataLoader

DATA = partial(DataLoader, Noisy(36), batch_size=4, shuffle=True)


class Forgetful(Metric):
    """Counts iterations, and has no state to save."""

    def reset(self):
        self.count = 0

    def update(self, output):
        self.count += 1

    def compute(self):
        return self.count


def make(folder, metric):
    trainer, run = make_small(folder, data=DATA)
    metric().attach(trainer, "m")
    return trainer, run


def resumed(tmp_path, metric):
    trainer, run = make(tmp_path, metric)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=12), lambda: trainer.terminate())
    run()
    again, run = make(tmp_path, metric)
    again.handlers["CheckpointRotation"].resume()
    run()
    return again.state.metrics["m"]


@pytest.mark.parametrize("metric", [Average, lambda: RunningAverage(output_transform=lambda loss: loss)])
def test_whole(tmp_path, metric):
    whole, run = make(tmp_path / "whole", metric)
    run()
    assert resumed(tmp_path / "parts", metric) == whole.state.metrics["m"]


def test_partial(tmp_path):
    with pytest.warns(UserWarning, match="the metrics Forgetful keep no state; in epoch 2 they cover only"):
        assert resumed(tmp_path, Forgetful) == 6
