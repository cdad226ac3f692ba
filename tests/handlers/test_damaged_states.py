"""States of handlers from a file that no handler has written: refused when they are loaded, not at the first step after."""

import pytest
import torch
from toys import batches, scripted, trainer_of

from camshaft import CheckpointError
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import save_durably
from camshaft.handlers import CheckpointRotation, EarlyStopping, Evaluation, LRScheduling, TensorBoard

FIELDS = [
    ("EarlyStopping", "best"),
    ("EarlyStopping", "stale"),
    ("TensorBoard", "losses"),
    ("TensorBoard", "batches"),
    ("LRScheduling", "scheduler", "step_size"),
    ("LRScheduling", "scheduler", "gamma"),
    ("LRScheduling", "scheduler", "last_epoch"),
    ("LRScheduling", "scheduler", "_step_count"),
]
WRONG = {"text": "x", "digits": "12", "mapping": {}, "list": [1], "matrix": torch.ones(3, 3)}


def trainer_in(folder):
    trainer = trainer_of()
    Evaluation(scripted([1.0, 2.0, 3.0, 4.0]), [0]).attach(trainer)
    EarlyStopping("val/score").attach(trainer)
    TensorBoard(folder / "board", every=3).attach(trainer)
    LRScheduling(torch.optim.lr_scheduler.StepLR(trainer.primary.optimizers[0], 2)).attach(trainer)
    return trainer, CheckpointRotation(folder / "checkpoints").attach(trainer)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A checkpoint's content after 2 epochs of 4 batches."""
    trainer, checkpoints = trainer_in(tmp_path_factory.mktemp("good"))
    trainer.run(batches(4), max_epochs=2)
    return load_checked(checkpoints.last)


def replaced(tree, path, value):
    """A copy of nested dicts with another value at a path."""
    if not path:
        return value
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], value)}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("field", FIELDS, ids="/".join)
def test_a_value_of_another_kind_is_refused_and_changes_nothing(field, wrong, content, tmp_path):
    assert set(content["handlers"]) >= {path[0] for path in FIELDS}
    path = tmp_path / "step-00000099.pt"
    save_durably({**content, "handlers": replaced(content["handlers"], field, WRONG[wrong])}, path)
    trainer, checkpoints = trainer_in(tmp_path)
    before = trainer.checkpoint()["handlers"]
    with pytest.raises(CheckpointError, match=path.name):
        checkpoints.resume(path)
    assert str(trainer.checkpoint()["handlers"]) == str(before)
    trainer.run(batches(4), max_epochs=1)
    assert trainer.state.optimizer_step == 4


def test_what_was_saved_is_loaded(content, tmp_path):
    path = tmp_path / "step-00000099.pt"
    save_durably(content, path)
    trainer, checkpoints = trainer_in(tmp_path)
    checkpoints.resume(path)
    assert str(trainer.checkpoint()["handlers"]) == str(content["handlers"])
