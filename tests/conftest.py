"""Fixtures for every test: seeds the generators, and checks that the test leaves no threads or settings behind."""

import gc
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch

collect_ignore_glob = ["*/conftest.py"]  # several conftest.py files cannot be searched for doctests in one run

LIBRARY_THREADS = ("tqdm_monitor", "InductorSubproc", "subproc_worker_timer", "Dummy-")
"""Name prefixes of threads that libraries keep running for the lifetime of the process: tqdm, torch.compile's workers, and
autograd's threads of a GPU, which get this name when they call Python."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _torch_settings():
    return {
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast on the CPU": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


def _environment():
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TORCHINDUCTOR_", "TRITON_"))}


def _threads(before=()):
    return [t for t in threading.enumerate() if t not in before and not t.name.startswith(LIBRARY_THREADS)]


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    """Fails a test that leaves a thread, a signal handler, or a changed setting of torch or the environment."""
    threads, environment, settings = _threads(), _environment(), _torch_settings()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    deadline = time.monotonic() + 3
    while (left := _threads(threads)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"the test left threads running: {left}"
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers, "the test left a signal handler"
    assert _environment() == environment, "the test changed the environment"
    assert _torch_settings() == settings, "the test changed a setting of torch"


@pytest.fixture
def collected():
    """Collects garbage after the test, because loaders with persistent workers are kept alive by reference cycles."""
    yield
    gc.collect()
