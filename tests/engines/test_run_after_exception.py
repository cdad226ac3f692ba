"""A trainer can run again after an exception."""

from __future__ import annotations

import pytest
from torch.utils.data import IterableDataset
from toys import batches, linear, same, trainer_of, weights

from camshaft import (
    Events,
    StepEvents,
)


class Stream(IterableDataset):
    """Data that can be passed over again and again, but not counted."""

    def __init__(self, data=()):
        self.data = data

    def __iter__(self):
        return iter(self.data)


class Broken(Stream):
    """A loader that fails after its last batch."""

    def __iter__(self):
        yield from self.data
        raise OSError("the disk is gone")


MOMENTS = [
    *StepEvents,
    *(Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED),
    *(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED),
]


def small_batches():
    """Without an overflow in half precision."""
    return [(0.1 * x, 0.1 * y) for x, y in batches()]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("event", MOMENTS, ids=lambda event: event.name)
def test_next_run_after_an_exception_trains_whole_epochs(event, accumulation_steps):
    """It goes on with the next epoch, as after ``terminate()``, and nothing of the window that was open is left."""
    model, expected = linear(), linear()
    trainer = trainer_of(model, accumulation_steps=accumulation_steps, amp="fp16")
    if event is StepEvents.OPTIMIZER_STEP_SKIPPED:
        overflow = lambda: model.weight.grad.fill_(float("inf"))  # noqa: E731
        trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=accumulation_steps), overflow)
    with trainer.add_event_handler(event(once=1), lambda: 1 / 0), pytest.raises(ZeroDivisionError) as caught:
        trainer.run(small_batches(), max_epochs=2)
    assert any("epoch 1, iteration" in note for note in caught.value.__notes__)
    expected.load_state_dict(model.state_dict())
    steps = trainer.state.optimizer_step
    trainer.run(small_batches(), max_epochs=2)
    state = trainer_of(expected, accumulation_steps=accumulation_steps, amp="fp16").run(small_batches())
    assert trainer.state.optimizer_step - steps == state.optimizer_step > 0
    assert same(weights(model), weights(expected))


@pytest.mark.parametrize("event", [*list(StepEvents)[:-1], Events.STARTED, Events.COMPLETED], ids=lambda event: event.name)
def test_run_after_an_exception_in_its_last_epoch_begins_anew(event):
    trainer, seen = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(trainer.state.iteration))
    with trainer.add_event_handler(event, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        trainer.run(batches())
    seen.clear()
    state = trainer.run(batches())
    assert (seen, state.epoch, state.optimizer_step) == ([1, 2, 3], 1, 3)


@pytest.mark.parametrize("bad", [[], [None] * 3, Broken()], ids=["empty", "no pairs", "broken"])
def test_trainer_runs_after_bad_data(bad):
    model, expected = linear(), linear()
    trainer = trainer_of(model)
    with pytest.raises((ValueError, TypeError, OSError), match="size|pair|disk"):
        trainer.run(bad)
    trainer.run(batches())
    trainer_of(expected).run(batches())
    assert same(weights(model), weights(expected))
