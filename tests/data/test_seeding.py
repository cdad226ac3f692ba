"""Seeding of this process and of the workers of a loader."""

import os
import random

import numpy as np
import pytest
import torch

from camshaft import SeededDataset, seed_everything, worker_init_fn


@pytest.fixture
def settings(monkeypatch):
    """Restores torch's global settings afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as it was")
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_seed_gives_the_same_numbers_in_all_generators(settings):
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first


def test_another_seed_gives_other_numbers_in_all_generators(settings):
    seed_everything(5)
    first = draw()
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_smallest_and_the_largest_seed_are_allowed(seed, settings):
    seed_everything(seed)
    assert torch.initial_seed() == seed


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None, True])
def test_a_seed_out_of_range_raises(seed):
    with pytest.raises(ValueError, match="seed must be an integer from 0 to"):
        seed_everything(seed)


def test_deterministic_sets_torch_and_keeps_the_configured_cublas_workspace(settings):
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "as it was"


def test_deterministic_sets_a_cublas_workspace_if_there_is_none(settings, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seed_everything(0, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_benchmark_sets_cudnn_benchmark(settings):
    seed_everything(0, benchmark=True)
    assert torch.backends.cudnn.benchmark
    seed_everything(0)
    assert not torch.backends.cudnn.benchmark


def test_deterministic_and_benchmark_together_raise():
    with pytest.raises(ValueError, match="deterministic and benchmark contradict each other"):
        seed_everything(0, deterministic=True, benchmark=True)


class Drawing(torch.utils.data.Dataset):
    """Each sample is drawn from the global generators of Python and NumPy in the worker."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand()], dtype=torch.float64)


def worker_draws(seed, **options):
    loader = torch.utils.data.DataLoader(Drawing(), batch_size=1, num_workers=2, worker_init_fn=worker_init_fn, **options)
    torch.manual_seed(seed)
    return [tuple(batch[0].tolist()) for _ in range(2) for batch in loader]


def test_workers_draw_different_numbers_in_each_worker_and_epoch():
    draws = worker_draws(1)
    assert len({python for python, _ in draws}) == 8
    assert len({numpy for _, numpy in draws}) == 8


def test_workers_draw_the_same_numbers_after_the_same_seed():
    assert worker_draws(1) == worker_draws(1)


def test_worker_seeds_are_in_the_range_of_numpy():
    torch.manual_seed(2**40 + 3)
    worker_init_fn(0)
    first = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    assert (random.random(), np.random.rand()) == first


def test_a_seed_may_be_an_integer_of_numpy(settings):
    seed_everything(np.int64(5))
    first = draw()
    seed_everything(5)
    assert draw() == first
    assert type(SeededDataset(range(3), np.uint32(4)).seed) is int
