"""A run ends in order before its time is up."""

import pytest
from ignite.engine import Events
from toys import batches, trainer_of

from camshaft import CheckpointRotation, TimeLimit


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("camshaft.handlers.time_limit.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def limited(clock, hours, seconds_per_batch, **options):
    trainer = trainer_of(**options)
    TimeLimit(hours).attach(trainer)

    def pass_time():
        clock.now += seconds_per_batch

    trainer.add_event_handler(Events.ITERATION_STARTED, pass_time)
    return trainer


def test_it_leaves_room_for_two_more_steps(clock):
    trainer = limited(clock, hours=100 / 3600, seconds_per_batch=10)
    trainer.run(batches(50))
    assert trainer.state.iteration == 9  # 10 s are left, 20 are wanted
    assert trainer.state.stop_reason.startswith("time limit of 0.0277")


def test_a_window_is_closed_first(clock):
    trainer = limited(clock, hours=100 / 3600, seconds_per_batch=10, accumulation_steps=4)
    trainer.run(batches(50))
    assert trainer.state.iteration % 4 == 0
    assert not trainer.window_is_open
    assert clock.now < 100


def test_with_time_enough_nothing_happens(clock):
    trainer = limited(clock, hours=1, seconds_per_batch=10)
    trainer.run(batches(5))
    assert trainer.state.stop_reason is None


def test_the_end_is_saved(clock, tmp_path):
    trainer = limited(clock, hours=100 / 3600, seconds_per_batch=10)
    checkpoints = CheckpointRotation(tmp_path, every=Events.COMPLETED).attach(trainer)
    trainer.run(batches(50))
    assert checkpoints.last.name == f"step-{trainer.state.optimizer_step:08d}.pt"


@pytest.mark.parametrize("hours", [0, -1, "1", True, None, float("nan")])
def test_a_limit_that_is_none_is_an_error(hours):
    with pytest.raises(ValueError, match="hours must be a positive number, got"):
        TimeLimit(hours)
