"""Seeds for this process and for the workers of a data loader."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from camshaft.rng import preserve_rng_state, reseed
from camshaft.validation import as_integer

__all__ = ["SeededDataset", "seed_everything", "worker_init_fn"]


def seed_everything(seed: int, deterministic: bool = False, benchmark: bool = False) -> None:
    """Seeds Python, NumPy and torch, on the CPU and every accelerator.

    Args:
        seed: from 0 to 2**32 - 1 (NumPy's range).
        deterministic: makes torch use only deterministic algorithms, and raise if there is none. On CUDA this needs
            ``CUBLAS_WORKSPACE_CONFIG``, which is set here if it is not set; call it before the first CUDA operation.
        benchmark: lets cuDNN choose the fastest convolution by trial; the choice may differ between runs.

    Raises:
        ValueError: if the seed is out of range, or both ``deterministic`` and ``benchmark`` are set.

    Example:
        >>> seed_everything(0)
        >>> torch.rand(1)
        tensor([0.4963])
    """
    seed = check_seed(seed)
    if deterministic and benchmark:
        raise ValueError("deterministic and benchmark contradict each other: a benchmark chooses by time")
    reseed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark


def check_seed(seed: Any) -> int:
    """The seed as an ``int``; raises ``ValueError`` if NumPy does not accept it."""
    number = as_integer(seed)
    if number is None or not 0 <= number < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    return number


def worker_init_fn(worker_id: int) -> None:
    """For ``DataLoader(worker_init_fn=worker_init_fn)``: seeds Python and NumPy from torch's seed of the worker.

    torch already does this in the workers that it starts. The function is for scripts that want to be explicit, and for
    loaders that start their workers in another way. No two workers, and no two epochs, draw the same numbers.

    Args:
        worker_id: passed by the data loader.

    Example:
        >>> loader = torch.utils.data.DataLoader(range(8), num_workers=2, worker_init_fn=worker_init_fn)
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)


class SeededDataset(Dataset[Any]):
    """Makes random augmentation depend only on the seed, the epoch and the sample's index.

    Without it, the random numbers for a sample depend on the samples that its worker has loaded before, so that a run which
    is resumed in the middle of an epoch, or with another number of workers, augments differently. Inside
    ``dataset[index]`` the global generators of Python, NumPy and torch are seeded for that sample, and restored afterwards.
    This costs some tens of microseconds per sample. A trainer sets the epoch automatically.

    Args:
        dataset: any map-style dataset.
        seed: from 0 to 2**32 - 1.

    Raises:
        TypeError: if ``dataset`` has no length or can't be indexed.
        ValueError: if the seed is out of range.

    Example:
        >>> class Noisy(torch.utils.data.Dataset):
        ...     def __len__(self):
        ...         return 8
        ...
        ...     def __getitem__(self, index):
        ...         return index + torch.rand(())
        >>> dataset = SeededDataset(Noisy(), seed=1)
        >>> bool(dataset[3] == dataset[3])
        True
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"dataset must be map-style, with a length and an index, got {type(dataset).__name__}")
        self.dataset, self.seed = dataset, check_seed(seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # persistent workers see it change

    @property
    def epoch(self) -> int:
        """The epoch for the samples drawn from now on."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, in every worker too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if get_worker_info() is not None:  # a worker has its own generators
            self._seed(index)
            return self.dataset[index]
        with preserve_rng_state():
            self._seed(index)
            return self.dataset[index]

    def _seed(self, index: Any) -> None:
        words = np.random.SeedSequence([self.seed, self.epoch, int(index)]).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]))
