"""Errors for the data and the length of a run."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import batches, names_iteration, trainer_of

from camshaft import (
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


class Sized(Broken):
    def __len__(self):
        return 10


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_iters": 5}])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (list, "zero size"),
        (lambda: DataLoader(TensorDataset(torch.zeros(3, 3)), batch_size=4, drop_last=True), "zero size"),
        (lambda: iter(()), "the data"),
        (Stream, "the data"),
        (lambda: DataLoader(Stream()), "the data"),
    ],
    ids=["list", "loader", "iterator", "stream", "loader of a stream"],
)
def test_empty_data_raises(make, match, limit):
    with pytest.raises((ValueError, RuntimeError), match=match):
        trainer_of().run(make(), **limit)


@pytest.mark.parametrize("kind", [Broken, Sized])
def test_an_exception_of_a_loader_names_the_iteration(kind):
    trainer, data = trainer_of(), kind(batches(2))
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trainer.run(data, max_epochs=2)
    assert names_iteration(caught, 2)
    assert trainer.state.optimizer_step == 2


def test_an_exception_of_a_dataset_names_the_iteration():
    class Rows(TensorDataset):
        def __getitem__(self, index):
            if index == 5:
                raise KeyError("row 5 has no label")
            return super().__getitem__(index)

    loader = DataLoader(Rows(torch.zeros(8, 3), torch.zeros(8, 2)), batch_size=2)
    with pytest.raises(KeyError, match="row 5 has no label") as caught:
        trainer_of().run(loader)
    assert names_iteration(caught, 2)


@pytest.mark.parametrize("data", [5, object()], ids=["number", "object"])
def test_data_that_is_not_iterable_raises(data):
    with pytest.raises(TypeError, match="iterable"):
        trainer_of().run(data)


def test_a_run_without_data_raises():
    with pytest.raises(ValueError, match="epoch_length"):
        trainer_of().run()


@pytest.mark.parametrize("argument", ["max_epochs", "max_iters", "epoch_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_the_length_of_a_run_must_be_a_positive_integer(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer, got {value!r}"):
        trainer_of().run(batches(), **{argument: value})


def test_max_epochs_and_max_iters_together_raise():
    with pytest.raises(ValueError, match="max_epochs"):
        trainer_of().run(batches(), max_epochs=1, max_iters=2)


@pytest.mark.parametrize("kind", [list, Stream])
def test_a_run_that_drops_every_window_raises(kind):
    trainer = trainer_of(accumulation_steps=4, partial_window="drop")
    with pytest.raises(RuntimeError, match="without one optimizer step"):
        trainer.run(kind(batches(3)), max_epochs=2)


class Empty:
    def __iter__(self):
        return iter(())


def test_a_run_without_batches_raises():
    with pytest.raises(RuntimeError, match="ended after 0 iterations without one optimizer step: the data was empty"):
        trainer_of().run(Empty())


def test_the_error_for_dropped_windows_names_partial_window():
    with pytest.raises(RuntimeError, match="ended after 3 iterations.*dropped by partial_window='drop'"):
        trainer_of(accumulation_steps=4, partial_window="drop").run(batches(3))


def test_a_run_that_skips_every_step_does_not_raise():
    trainer = trainer_of()
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda e: e.skip_step_if(torch.tensor(True)))
    assert trainer.run(batches(3)).skipped_steps == 3


def test_a_terminated_run_without_a_step_does_not_raise():
    trainer = trainer_of()
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda e: e.terminate())
    assert trainer.run(batches(3)).optimizer_step == 0


@pytest.mark.parametrize("argument", ["max_epochs", "max_iters", "epoch_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_a_limit_must_be_a_positive_integer(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer, got {value!r}"):
        trainer_of().run(batches(3), **{argument: value})
