"""Saving, restoring and preserving the state of the random number generators."""

import random

import numpy as np
import pytest
import torch

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import save_durably
from camshaft.rng import encode_generator, preserve_rng_state, restore_generator, restore_rng, rng_state


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


def philox():
    return np.random.Generator(np.random.Philox(3))


GENERATORS = {
    "torch": (torch.Generator, lambda generator: float(torch.rand((), generator=generator))),
    "Python": (random.Random, lambda generator: (generator.random(), generator.gauss(0, 1))),
    "NumPy's RandomState": (np.random.RandomState, lambda generator: (generator.rand(), generator.randn())),
    "NumPy's Generator": (np.random.default_rng, lambda generator: (generator.random(), generator.integers(9))),
    "NumPy's Philox": (philox, lambda generator: (generator.random(), generator.integers(9))),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_restore_generator_restores_each_kind_from_a_file(kind, tmp_path):
    make, draw_from = GENERATORS[kind]
    generator = make()
    draw_from(generator)
    save_durably({"state": encode_generator(generator)}, tmp_path / "rng.pt")
    expected = [draw_from(generator) for _ in range(3)]
    other = make()
    restore_generator(other, load_checked(tmp_path / "rng.pt")["state"])
    assert [draw_from(other) for _ in range(3)] == expected


def test_the_states_have_the_same_form_as_in_earlier_files():
    state = rng_state()
    version, words, _ = state["python"]
    keys, position, has_gauss, cached = state["numpy"]
    assert (version, words.dtype, words.shape) == (3, torch.int64, (625,))
    assert (keys.dtype, keys.shape) == (torch.int64, (624,))
    assert [type(value) for value in (position, has_gauss, cached)] == [int, int, float]
    assert [type(part) for part in encode_generator(random.Random(1))] == [int, list, type(None)]
    own = encode_generator(np.random.RandomState(1))
    assert list(own) == ["bit_generator", "state", "has_gauss", "gauss"]
    assert list(own["state"]["key"]) == ["values", "dtype"]
