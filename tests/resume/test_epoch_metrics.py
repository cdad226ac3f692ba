"""Metrics attached to the trainer are complete after a resume inside an epoch, or a warning says that they are not."""

from functools import partial

import pytest
from ignite.engine import Events
from ignite.metrics import Average, Metric, RunningAverage
from runs import NoisyDataset, make_small
from torch.utils.data import DataLoader

DATA = partial(DataLoader, NoisyDataset(36), batch_size=4, shuffle=True)


class StatelessMetric(Metric):
    """A metric that counts iterations and has no state dict."""

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
def test_metrics_of_a_resumed_epoch_are_complete(tmp_path, metric):
    uninterrupted, run = make(tmp_path / "uninterrupted", metric)
    run()
    assert resumed(tmp_path / "parts", metric) == uninterrupted.state.metrics["m"]


def test_a_metric_without_a_state_gives_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="the metrics StatelessMetric do not save their state; in epoch 2 they cover only"):
        assert resumed(tmp_path, StatelessMetric) == 6
