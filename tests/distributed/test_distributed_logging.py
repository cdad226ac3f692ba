"""Rank 0 alone writes files and shows bars, and what it logs is averaged over the ranks."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_rank_zero_alone_writes(results):
    first, second = results("files_and_bars_of_each_rank")
    files = list((results.folder() / "written" / "tensorboard").iterdir())
    assert [path.name for path in files if f".{second['pid']}." in path.name] == []
    assert len(files) == 1
    assert first["bar"] > 0
    assert second["bar"] == 0
    assert first["last"] == second["last"]


def test_the_logged_loss_is_the_mean_over_all_ranks(results):
    losses = torch.tensor([result["losses"] for result in results("files_and_bars_of_each_rank")])
    events = read_events(results.folder() / "written" / "tensorboard")
    points = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(points) == [2, 4, 6, 8, 10, 12, 14]
    for step, value in points.items():
        assert value == pytest.approx(float(losses[:, step - 2 : step].mean()), rel=1e-6)


def test_named_losses_are_averaged_over_the_ranks_that_return_them(results):
    assert results("losses_of_different_names") == [7, 7]
    events = read_events(results.folder() / "named losses")
    points = {name: [(e.step, e.value) for e in events.Scalars(f"train/{name}")] for name in ("one", "two", "extra")}
    assert points["one"] == [(step, 1.0) for step in range(1, 8)]
    assert points["two"] == [(step, 3.0) for step in range(1, 8)]
    assert points["extra"] == [(step, 5.0) for step in range(3, 8)]
