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
    """Data without a length that can be iterated over repeatedly."""

    def __init__(self, data=()):
        self.data = data

    def __iter__(self):
        return iter(self.data)


class Broken(Stream):
    """A loader that raises after its last batch."""

    def __iter__(self):
        yield from self.data
        raise OSError("the disk is gone")


MOMENTS = [
    *StepEvents,
    *(Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED),
    *(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED),
]


def small_batches():
    """Small values, which do not overflow in half precision."""
    return [(0.1 * x, 0.1 * y) for x, y in batches()]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("event", MOMENTS, ids=lambda event: event.name)
def test_the_next_run_after_an_exception_trains_complete_epochs(event, accumulation_steps):
    """It continues with the next epoch, as after ``terminate()``, and discards the open window."""
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
def test_a_run_after_an_exception_in_the_last_epoch_starts_again(event):
    trainer, seen = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(trainer.state.iteration))
    with trainer.add_event_handler(event, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        trainer.run(batches())
    seen.clear()
    state = trainer.run(batches())
    assert (seen, state.epoch, state.optimizer_step) == ([1, 2, 3], 1, 3)


@pytest.mark.parametrize("bad", [[], [None] * 3, Broken()], ids=["empty", "no pairs", "broken"])
def test_a_trainer_can_run_after_invalid_data(bad):
    model, expected = linear(), linear()
    trainer = trainer_of(model)
    with pytest.raises((ValueError, TypeError, OSError), match="size|pair|disk"):
        trainer.run(bad)
    trainer.run(batches())
    trainer_of(expected).run(batches())
    assert same(weights(model), weights(expected))
