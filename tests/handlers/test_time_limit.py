"""A run ends in an orderly way before its time limit."""

import pytest
from ignite.engine import Events
from toys import batches, trainer_of

from camshaft import CheckpointRotation, TimeLimit


class Clock:
    """A clock that the test advances."""

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


def test_it_reserves_the_time_of_two_steps(clock):
    trainer = limited(clock, hours=100 / 3600, seconds_per_batch=10)
    trainer.run(batches(50))
    assert trainer.state.iteration == 9  # 10 s are left, and 20 s are needed
    assert trainer.state.stop_reason.startswith("time limit of 0.0277")


def test_the_window_is_completed_first(clock):
    trainer = limited(clock, hours=100 / 3600, seconds_per_batch=10, accumulation_steps=4)
    trainer.run(batches(50))
    assert trainer.state.iteration % 4 == 0
    assert not trainer.window_is_open
    assert clock.now < 100


def test_with_enough_time_the_run_is_complete(clock):
    trainer = limited(clock, hours=1, seconds_per_batch=10)
    trainer.run(batches(5))
    assert trainer.state.stop_reason is None


def test_a_checkpoint_is_saved_at_the_end(clock, tmp_path):
    trainer = limited(clock, hours=100 / 3600, seconds_per_batch=10)
    checkpoints = CheckpointRotation(tmp_path, every=Events.COMPLETED).attach(trainer)
    trainer.run(batches(50))
    assert checkpoints.last.name == f"step-{trainer.state.optimizer_step:08d}.pt"


@pytest.mark.parametrize("hours", [0, -1, "1", True, None, float("nan")])
def test_an_invalid_limit_is_an_error(hours):
    with pytest.raises(ValueError, match="hours must be a positive number, got"):
        TimeLimit(hours)
