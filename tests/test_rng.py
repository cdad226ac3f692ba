"""Saving, restoring and preserving the state of the random number generators."""

import random

import numpy as np
import pytest
import torch

from camshaft.checkpoints.files import load_checked, save_durably
from camshaft.rng import preserve_rng_state, restore_rng, rng_state


def drawn():
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def test_every_generator_goes_on_from_where_its_state_was_taken(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both keep a second number in hand
    save_durably(rng_state(), tmp_path / "rng.pt")
    expected = [drawn() for _ in range(3)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    restore_rng(load_checked(tmp_path / "rng.pt"))
    assert [drawn() for _ in range(3)] == expected


def test_kept_generators_are_as_before_however_the_block_is_left():
    expected = (lambda state: (drawn(), restore_rng(state))[0])(rng_state())

    def disturb():
        drawn()
        raise KeyError("out")

    with pytest.raises(KeyError, match="out"), preserve_rng_state():
        disturb()
    assert drawn() == expected
