"""Seeds: for this process and for the workers of a data loader."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

__all__ = ["seed_everything", "worker_init_fn"]


def seed_everything(seed: int, deterministic: bool = False, benchmark: bool = False) -> None:
    """Seeds Python, NumPy and torch, on the CPU and every accelerator.

    Args:
        seed: from 0 to 2**32 - 1 (NumPy's range).
        deterministic: makes torch use deterministic algorithms only, and raise where there is none. On CUDA this needs
            ``CUBLAS_WORKSPACE_CONFIG``, which is set here where it isn't; call it before the first CUDA operation.
        benchmark: lets cuDNN try out which convolution is the fastest; its choice may differ from run to run.

    Raises:
        ValueError: where the seed is out of range, or ``deterministic`` and ``benchmark`` are both asked for.

    Example:
        >>> seed_everything(0)
        >>> torch.rand(1)
        tensor([0.4963])
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    if deterministic and benchmark:
        raise ValueError("deterministic and benchmark contradict each other: a benchmark chooses by time")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # every accelerator's generators too
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark


def worker_init_fn(worker_id: int) -> None:
    """For ``DataLoader(worker_init_fn=worker_init_fn)``: seeds Python and NumPy from torch's seed of the worker.

    torch gives each worker, in each epoch, a seed of its own; without this function code that draws from NumPy's or Python's
    global generator may draw the same numbers in every worker.

    Args:
        worker_id: given by the data loader.

    Example:
        >>> loader = torch.utils.data.DataLoader(range(8), num_workers=2, worker_init_fn=worker_init_fn)
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
