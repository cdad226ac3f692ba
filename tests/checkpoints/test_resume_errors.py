"""Checkpoints that cannot be resumed or written: each error says why, and nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import batches, linear, same, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    load_weights,
)


def rotation_of(folder, model=None, optimizer=None):
    return CheckpointRotation(folder).attach(trainer_of(model, optimizer))


@pytest.fixture
def checkpoint(tmp_path):
    rotation = rotation_of(tmp_path / "run")
    rotation.engine.run(batches())
    return rotation.last


def test_resuming_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pt does not exist"):
        rotation_of(tmp_path).resume(tmp_path / "missing.pt")


def test_resuming_a_missing_best_checkpoint_raises(checkpoint):
    with pytest.raises(RuntimeError, match="no best checkpoint"):
        rotation_of(checkpoint.parent).resume("best")


@pytest.mark.parametrize("which", ["auto", "path"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: nn.Linear(3, 4),
            r"3\.pt can't be resumed here: .* yours \(phase 'model'\): .*weight \(\(2, 3\) in the checkpoint, \(4, 3\) here\)",
        ),
        (lambda: nn.Sequential(linear()), "only the checkpoint has weight, bias; only the model has 0.weight, 0.bias"),
    ],
    ids=["other shape", "other names"],
)
def test_resuming_a_checkpoint_of_another_model_raises_and_changes_nothing(checkpoint, make, match, which):
    model = make()
    before = weights(model)
    rotation = rotation_of(checkpoint.parent, model)
    with pytest.raises(ValueError, match=match):
        rotation.resume(checkpoint if which == "path" else "auto")
    assert same(weights(model), before)
    assert rotation.engine.state.optimizer_step == 0


def test_resuming_a_checkpoint_of_another_optimizer_raises(checkpoint):
    model = linear()
    with pytest.raises(ValueError, match="optimizer is of another kind than the Adam"):
        rotation_of(checkpoint.parent, model, torch.optim.Adam(model.parameters())).resume(checkpoint)


def test_a_folder_instead_of_a_checkpoint_raises(checkpoint):
    folder = checkpoint.parent
    match = rf"is a folder of checkpoints.* such as {checkpoint}, or attach CheckpointRotation\('{folder}'\) .*resume\('auto'\)"
    with pytest.raises(RuntimeError, match=match):
        rotation_of(folder.parent).resume(folder)
    with pytest.raises(RuntimeError, match=match):
        load_weights(linear(), folder)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_created_raises_on_attach(folder, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = trainer_of()
    with pytest.raises(OSError, match=r"dirname: checkpoints can't be written there \(.*file is a file, not a folder\)"):
        CheckpointRotation(tmp_path / folder).attach(trainer)
    assert trainer.handlers == {}
