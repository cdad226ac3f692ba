"""Checkpoints that an earlier version has written resume: at the same clocks, data and random states.

Another processor may round otherwise than the one that has written the files, so that weights are compared with a tolerance.
"""

import pytest
import torch
from earlier_runs import EPOCHS, FOLDER, MAKERS, STOPS


def ending(trainer):
    """What a run ends with: weights, optimizers, clocks, random state."""
    end = trainer.checkpoint()
    return {name: end[name] for name in ("phases", "rng", "clocks", "handlers")}


def assert_same(found, expected, path=""):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{path}: {text}")
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}/{number}")
    else:
        assert found == pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else found == expected, path


@pytest.mark.parametrize(("name", "stop"), [(name, stop) for name, stops in STOPS.items() for stop in stops])
def test_a_run_resumed_from_an_earlier_file_ends_like_an_uninterrupted_one(name, stop, tmp_path):
    whole, _, data = MAKERS[name](tmp_path / "whole")
    whole.run(data, max_epochs=EPOCHS)
    resumed, checkpoints, data = MAKERS[name](tmp_path / "resumed")
    assert checkpoints.resume(FOLDER / f"{name}-{stop}.pt") is not None
    assert resumed.state.iteration == stop
    resumed.run(data, max_epochs=EPOCHS)
    assert_same(ending(resumed), ending(whole))
