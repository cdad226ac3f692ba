"""Saving, restoring and preserving the state of the random number generators."""

import random

import numpy as np
import pytest
import torch

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import save_durably
from camshaft.rng import preserve_rng_state, restore_rng, rng_state


def draw():
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def test_restore_rng_restores_every_generator(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both cache a second number
    save_durably(rng_state(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(3)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    restore_rng(load_checked(tmp_path / "rng.pt"))
    assert [draw() for _ in range(3)] == expected


def test_preserve_rng_state_restores_every_generator_after_an_exception():
    expected = (lambda state: (draw(), restore_rng(state))[0])(rng_state())

    def change_and_fail():
        draw()
        raise KeyError("out")

    with pytest.raises(KeyError, match="out"), preserve_rng_state():
        change_and_fail()
    assert draw() == expected
