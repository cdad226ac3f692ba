"""A checkpoint of a model with compiled parts resumes in one without, and the other way round."""

from __future__ import annotations

import pytest
import torch
from compiled_parts import FORMS, NAMES, TwoParts, with_compiled_block
from toys import batches, same, sgd, trainer_of, weights

from camshaft import CheckpointRotation, ExponentialMovingAverage


def run_of(form, folder, seed=0):
    model = FORMS[form](TwoParts(seed))
    trainer = trainer_of(model, sgd(model, momentum=0.9))
    return model, trainer, CheckpointRotation(folder).attach(trainer)


@pytest.mark.parametrize(("saved", "resumed"), [(form, "plain") for form in FORMS] + [("plain", form) for form in FORMS])
def test_a_run_resumes_in_any_form(saved, resumed, tmp_path):
    model, trainer, _ = run_of(saved, tmp_path)
    trainer.run(batches(4), max_epochs=2)
    half, trainer, rotation = run_of(saved, tmp_path / "half")
    trainer.run(batches(4), max_epochs=1)
    assert list(trainer.checkpoint()["phases"]["model"]["module"]) == NAMES
    other, trainer, rotation = run_of(resumed, tmp_path / "half", seed=1)
    rotation.resume("auto")
    assert same(weights(other), weights(half))
    trainer.run(batches(4), max_epochs=2)
    assert all(torch.allclose(a, b) for a, b in zip(weights(other), weights(model), strict=True))


@pytest.mark.parametrize("form", ["plain", "compiled block"])
def test_a_checkpoint_with_the_names_of_the_compiled_parts_resumes(form, tmp_path):
    """Earlier versions saved these names as they are."""
    source = with_compiled_block(TwoParts(0))
    trainer = trainer_of(source)
    trainer.run(batches(2))
    content = trainer.checkpoint()
    content["phases"]["model"]["module"] = dict(source.state_dict())
    model = FORMS[form](TwoParts(1))
    resumed = trainer_of(model)
    resumed.restore(content)
    assert same(weights(model), weights(source))


@pytest.mark.parametrize(("saved", "resumed"), [("compiled block", "plain"), ("plain", "compiled block")])
def test_an_average_resumes_in_the_other_form(saved, resumed, tmp_path):
    _, trainer, _ = run_of(saved, tmp_path)
    average = ExponentialMovingAverage(0.5).attach(trainer)
    trainer.run(batches(4))
    other, trainer, rotation = run_of(resumed, tmp_path, seed=1)
    restored = ExponentialMovingAverage(0.5).attach(trainer)
    rotation.resume("auto")
    assert same(weights(restored.module), weights(average.module))
    with restored.swapped_in():
        assert same(weights(other), weights(average.module))
