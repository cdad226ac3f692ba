"""What ``explain(speed=True)`` suggests for the data and its loader."""

import os
import re

import pytest
import torch
from speed_runs import (
    advice_about,
    already_enabled,
    picture_data,
    picture_trainer,
    speed_report,
    suggestions,
)
from torch.utils.data import DataLoader, IterableDataset
from toys import batches, trainer_of

from camshaft.reports.speed import about_data

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


UNKNOWN_DATA = "the data is not known before the first run, so that nothing is suggested for its loader"


def test_before_the_first_run_the_data_is_unknown():
    assert speed_report(trainer_of()).endswith(UNKNOWN_DATA)


def test_after_a_run_the_data_is_known():
    trainer = trainer_of()
    trainer.run(batches(2))
    assert UNKNOWN_DATA not in speed_report(trainer)


@pytest.mark.usefixtures("collected")
def test_the_start_of_workers_is_measured():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4, num_workers=1), max_epochs=2)
    assert re.search(
        r"measured \d+ ms an epoch", advice_about("DataLoader(..., persistent_workers=True)", speed_report(trainer))
    )


@pytest.mark.usefixtures("collected")
def test_enabled_persistent_workers_are_not_suggested():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4, num_workers=1, persistent_workers=True), max_epochs=2)
    assert "DataLoader(..., persistent_workers=True)" in already_enabled(speed_report(trainer))


def test_persistent_workers_are_not_suggested_for_one_epoch():
    loader = DataLoader(picture_data(), 4, num_workers=1)
    assert list(about_data(loader, CPU, non_blocking=True, epochs=1)) == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no room for workers")
def test_workers_are_suggested_for_a_loader_without_workers():
    (word,) = suggestions(about_data(DataLoader(picture_data(), 4), CPU, non_blocking=True, epochs=2))
    assert re.fullmatch(r"DataLoader\(\.\.\., num_workers=[1-4]\)", word)


class Stream(IterableDataset):
    """A dataset without a length."""

    def __iter__(self):
        return iter(range(4))


def test_workers_are_not_suggested_for_an_iterable_dataset():
    assert list(about_data(DataLoader(Stream()), CPU, non_blocking=True, epochs=2)) == []


def test_pinned_memory_and_prefetch_are_suggested_for_a_gpu():
    found = suggestions(about_data(DataLoader(picture_data(), 4, num_workers=1), CUDA, non_blocking=True, epochs=1))
    assert found == ["DataLoader(..., pin_memory=True)", "Prefetch(loader, device)"]


def test_non_blocking_copies_are_suggested_for_pinned_memory():
    loader = DataLoader(picture_data(), 4, num_workers=1, pin_memory=True)
    assert "non_blocking=True" in suggestions(about_data(loader, CUDA, non_blocking=False, epochs=1))
    assert "non_blocking=True" not in suggestions(about_data(loader, CUDA, non_blocking=True, epochs=1))


def test_nothing_is_suggested_for_unknown_data_on_a_gpu():
    assert list(about_data(None, CUDA, non_blocking=True, epochs=None)) == []
