"""Keras's and Poutyne's own callbacks."""

import os
import subprocess
import sys
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import toys
from keras_callbacks import Recorder
from toys import batches, linear, model_of, same, scripted, sgd, trainer_of, weights

from camshaft import CheckpointRotation, Evaluation, ExponentialMovingAverage, KerasStyle


def from_poutyne(name):
    """A class of Poutyne."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of Poutyne and of its imports
        return getattr(pytest.importorskip("poutyne"), name)


def test_poutynes_early_stopping_stops_at_the_same_epoch_as_in_poutyne():
    stopping = from_poutyne("EarlyStopping")(monitor="val_score", patience=2, mode="max")
    trainer = trainer_of()
    Evaluation(scripted([0.1, 0.3, 0.2, 0.2, 0.9]), [0]).attach(trainer)
    KerasStyle(stopping).attach(trainer)
    assert trainer.run(batches(2), max_epochs=9).epoch == 4
    assert stopping.stopped_epoch == 4  # counted from 1


def test_poutynes_csv_logger_writes_its_columns(tmp_path):
    trainer = trainer_of()
    Evaluation(scripted([0.5, 0.75]), [0]).attach(trainer)
    logger = from_poutyne("CSVLogger")(str(tmp_path / "log.csv"))
    KerasStyle(logger, metrics_names=["score"]).attach(trainer)
    trainer.run(batches(2), max_epochs=2)
    head, *rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert head == ["epoch", "time", "lr", "loss", "score", "val_loss", "val_score"]
    assert [(row[0], row[2], row[-1]) for row in rows] == [("1", "0.1", "0.5"), ("2", "0.1", "0.75")]


def test_poutynes_clipping_equals_a_hand_written_loop():
    trainer, model = trainer_of(), linear()
    KerasStyle(from_poutyne("ClipNorm")(model_of(trainer).parameters(), 0.1)).attach(trainer)
    trainer.run(batches(3))
    optimizer = sgd(model)
    for x, y in batches(3):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert same(weights(model), weights(model_of(trainer)))


def test_poutynes_schedule_continues_after_a_resume(tmp_path):
    def trained(epochs):
        trainer = trainer_of()
        KerasStyle(from_poutyne("ExponentialLR")(gamma=0.5)).attach(trainer)
        CheckpointRotation(tmp_path).attach(trainer).resume()
        trainer.run(batches(2), max_epochs=epochs)
        return trainer.primary.optimizers[0].param_groups[0]["lr"]

    assert [trained(1), trained(3)] == [0.05, 0.0125]


def test_the_empty_base_class_of_a_library_counts_as_having_no_method():
    with pytest.raises(TypeError, match="got Callback with none"):
        KerasStyle(from_poutyne("Callback")())


def with_keras(script, folder):
    """The output of a script that uses Keras, in a process of its own, because importing Keras changes the environment."""
    if find_spec("keras") is None:
        pytest.skip("Keras isn't installed")
    start = "import keras; from keras.callbacks import *; from toys import *; from camshaft import *; trainer = trainer_of()\n"
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(Path(toys.__file__).parent)}
    command = [sys.executable, "-c", start + textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_keras_early_stopping_stops_at_the_same_epoch_as_in_keras(tmp_path):
    printed = with_keras(
        """
        stopping = keras.callbacks.EarlyStopping(monitor="val_score", patience=2, mode="max")
        Evaluation(scripted([0.1, 0.3, 0.2, 0.2, 0.9]), [0]).attach(trainer)
        KerasStyle(stopping).attach(trainer)
        print(trainer.run(batches(2), max_epochs=9).epoch, stopping.stopped_epoch)
        """,
        tmp_path,
    )
    assert printed == "4 3\n"  # Keras counts from 0


def test_keras_csv_logger_writes_its_columns(tmp_path):
    script = """
        Evaluation(scripted([0.5, 0.75]), [0]).attach(trainer)
        KerasStyle(CSVLogger("log.csv")).attach(trainer)
        trainer.run(batches(2), max_epochs=2)
    """
    with_keras(script, tmp_path)
    head, *rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert head == ["epoch", "loss", "val_score"]
    assert [(row[0], row[-1]) for row in rows] == [("0", "0.5"), ("1", "0.75")]


def test_keras_lambda_callback_has_only_the_methods_that_it_was_given(tmp_path):
    script = """
        adapter = KerasStyle(LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch))).attach(trainer)
        print(list(adapter.methods))
        trainer.run(batches(2), max_epochs=2)
    """
    assert with_keras(script, tmp_path) == "['on_epoch_end']\n0\n1\n"


def test_it_works_with_handlers_of_this_package(tmp_path):
    trainer, recorder = trainer_of(), Recorder()
    ExponentialMovingAverage(0.5).attach(trainer)
    KerasStyle(recorder).attach(trainer)
    plain = trainer_of()
    for one in (trainer, plain):
        one.run(batches(3))
    assert same(weights(model_of(trainer)), weights(model_of(plain)))
