"""Callbacks as Keras and Poutyne have them are called at their moments, with their logs, and without waiting for the device."""

import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import toys
from toys import batches, linear, model_of, same, scripted, sgd, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    Evaluation,
    Events,
    ExponentialMovingAverage,
    KerasStyle,
    create_gan_trainer,
    create_trainer,
)
from camshaft.engines.fire import no_handlers
from camshaft.keras_callbacks import METHODS


class Recorder:
    """Has every method, and notes each call: its name, its number and the logs that it was given."""

    def __init__(self):
        self.calls, self.params, self.model = [], None, None

    def set_params(self, params):
        self.params = params

    def set_model(self, model):
        self.model = model

    def __getattr__(self, name):
        if name not in METHODS:
            raise AttributeError(name)
        return lambda *args: self.calls.append((name, *args))

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


class Stateful:
    """Counts epochs, begins anew with each run, and says so in its state."""

    def __init__(self):
        self.epochs = None

    def on_train_begin(self, logs):
        self.epochs = 0

    def on_epoch_end(self, epoch, logs):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


def recorded(trainer=None, data=2, max_epochs=1, **options):
    trainer, recorder = trainer or trainer_of(), Recorder()
    KerasStyle(recorder, **options).attach(trainer)
    trainer.run(batches(data), max_epochs=max_epochs)
    return recorder


def only(**methods):
    """An object with these methods alone."""
    return type("Only", (), {name: staticmethod(function) for name, function in methods.items()})()


# -- when it is called ------------------------------------------------------------------------------------------------


def test_the_methods_are_called_in_the_order_of_a_run():
    batch = ["on_train_batch_begin", "on_backward_end", "on_train_batch_end"]
    epoch = ["on_epoch_begin", *batch, *batch, "on_epoch_end"]
    calls = recorded(max_epochs=2).calls
    assert [call[0] for call in calls] == ["on_train_begin", *epoch, *epoch, "on_train_end"]


@pytest.mark.parametrize(("style", "first"), [("keras", 0), ("poutyne", 1), (None, 0)])
def test_epochs_and_batches_are_counted_as_the_style_counts(style, first):
    recorder = recorded(max_epochs=2, style=style)
    for name in ("on_epoch_begin", "on_epoch_end"):
        assert [args[0] for args in recorder.named(name)] == [first, first + 1]
    for name in ("on_train_batch_begin", "on_backward_end", "on_train_batch_end"):
        assert [args[0] for args in recorder.named(name)] == [first, first + 1] * 2


def test_the_end_of_backward_comes_once_per_window_with_the_true_gradient():
    trainer, seen = trainer_of(accumulation_steps=2), []
    gradient = lambda t: [p.grad.clone() for p in model_of(t).parameters()]  # noqa: E731
    KerasStyle(only(on_backward_end=lambda batch: seen.append((batch, *gradient(trainer))))).attach(trainer)
    trainer.run(batches(4))
    model, expected = linear(), []
    for first, second in zip(batches(4)[::2], batches(4)[1::2], strict=True):
        optimizer = sgd(model)
        loss = sum(torch.nn.functional.mse_loss(model(x), y) / 2 for x, y in (first, second))
        expected.append(torch.autograd.grad(loss, list(model.parameters())))
        for parameter, grad in zip(model.parameters(), expected[-1], strict=True):
            parameter.grad = grad
        optimizer.step()
    assert [batch for batch, *_ in seen] == [1, 3]
    torch.testing.assert_close([tuple(grads) for _, *grads in seen], expected)


def test_a_gradient_that_it_clips_is_the_one_that_is_used():
    trainer = trainer_of()
    zero = lambda batch: [p.grad.zero_() for p in model_of(trainer).parameters()]  # noqa: E731
    before = weights(model_of(trainer))
    KerasStyle(only(on_backward_end=zero)).attach(trainer)
    trainer.run(batches(3))
    assert same(weights(model_of(trainer)), before)
    assert "KerasStyle(Only).end_backward  [changes gradients]" in trainer.explain()


@pytest.mark.parametrize(("old", "new"), [("on_batch_begin", "on_train_batch_begin"), ("on_batch_end", "on_train_batch_end")])
def test_an_older_name_is_called_where_the_newer_one_is_missing(old, new):
    trainer, seen = trainer_of(), []
    KerasStyle(only(**{old: lambda batch, logs: seen.append(old)})).attach(trainer, "old")
    both = {old: lambda batch, logs: seen.append("wrong"), new: lambda batch, logs: seen.append(new)}
    KerasStyle(only(**both)).attach(trainer, "both")
    trainer.run(batches(1))
    assert seen == [old, new]


def test_an_epoch_ends_after_its_evaluation_and_before_its_checkpoint(tmp_path):
    trainer, seen = trainer_of(), []
    checkpoints = CheckpointRotation(tmp_path).attach(trainer)
    KerasStyle(only(on_epoch_end=lambda epoch, logs: seen.append((checkpoints.last, logs["val_score"])))).attach(trainer)
    Evaluation(scripted([0.5]), [0]).attach(trainer)
    trainer.run(batches(2))
    assert seen == [(None, 0.5)]
    assert checkpoints.last is not None


# -- the logs ---------------------------------------------------------------------------------------------------------


def test_a_batchs_logs_hold_its_loss():
    trainer, losses = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.loss.item()))
    recorder = recorded(trainer, data=3)
    assert [dict(logs) for _, logs in recorder.named("on_train_batch_end")] == [{"loss": loss} for loss in losses]


def test_an_epochs_logs_hold_the_mean_over_its_samples():
    data = [*batches(2, size=4), *batches(1, size=2)]
    trainer, losses = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.loss.item()))
    KerasStyle(recorder := Recorder()).attach(trainer)
    trainer.run(data)
    mean = (4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10
    assert recorder.named("on_epoch_end") == [(0, {"loss": pytest.approx(mean)})]
    assert recorder.named("on_train_end") == [({"loss": pytest.approx(mean)},)]


def test_named_losses_are_there_by_name():
    def compute_loss(model, batch):
        loss = model(batch[0]).square().mean()
        return {"loss": loss, "twice": 2 * loss}

    model = linear()
    recorder = recorded(create_trainer(model, sgd(model), None, compute_loss=compute_loss))
    for name in ("on_train_batch_end", "on_epoch_end"):
        logs = recorder.named(name)[-1][1]
        assert logs["twice"] == pytest.approx(2 * logs["loss"])


def test_a_gans_losses_are_there_by_name():
    generator, critic = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    trainer, recorder = create_gan_trainer(generator, critic, sgd(generator), sgd(critic), latent=2), Recorder()
    KerasStyle(recorder).attach(trainer)
    trainer.run([x for x, _ in batches(3)])
    assert recorder.model.network is generator
    for name in ("on_train_batch_end", "on_epoch_end"):
        assert {"discriminator_loss", "generator_loss"} <= set(recorder.named(name)[-1][1]) <= set(trainer.state.losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_of_a_half_precisions_losses_is_kept_in_full_precision(dtype):
    values = [60_000.0, 60_000.0, 7.0]
    losses = iter(values)
    trainer = trainer_of(loss_fn=lambda y_pred, y: (y_pred.square().mean() * 0 + next(losses)).to(dtype))
    logs = recorded(trainer, data=3).named("on_epoch_end")[0][1]
    assert logs["loss"] == pytest.approx(torch.tensor(values).to(dtype).float().mean().item())


def test_metrics_are_named_as_keras_names_them_and_only_where_they_are_new():
    trainer = trainer_of()
    Evaluation(scripted([0.5, 0.75]), [0], every=Events.EPOCH_COMPLETED(every=2)).attach(trainer)
    ends = recorded(trainer, max_epochs=4).named("on_epoch_end")
    assert [logs.get("val_score") for _, logs in ends] == [None, 0.5, None, 0.75]


def test_poutynes_logs_have_the_number_the_size_and_the_time():
    recorder = recorded(style="poutyne", max_epochs=2)
    batch, epoch = recorder.named("on_train_batch_end")[-1][1], recorder.named("on_epoch_end")[-1][1]
    assert list(batch) == ["batch", "size", "time", "loss"]
    assert (batch["batch"], batch["size"], epoch["epoch"]) == (2, 4, 2)
    assert 0 < batch["time"] <= epoch["time"] < 60


def test_a_batchs_logs_behave_like_a_dict():
    logs = recorded(data=1).named("on_train_batch_end")[0][1]
    logs["extra"] = 1
    assert "loss" in logs
    assert len(logs) == 2
    assert logs == {**logs} == logs.copy() == dict(logs.items())
    assert json.loads(json.dumps(logs.copy())) == logs
    assert repr(logs) == repr(dict(logs))
    del logs["extra"]
    assert [type(value) for value in logs.values()] == [float]


class Fetched(torch.Tensor):
    """A tensor that counts how often it is brought to the host."""

    fetches = 0

    def item(self):
        Fetched.fetches += 1
        return super().item()

    def __float__(self):
        Fetched.fetches += 1
        return super().__float__()


def counting_fetches(callback, monkeypatch, data=12):
    monkeypatch.setattr(Fetched, "fetches", 0)
    trainer = trainer_of(loss_fn=lambda y_pred, y: (y_pred - y).square().mean().as_subclass(Fetched))
    KerasStyle(callback).attach(trainer)
    trainer.run(batches(data))
    return Fetched.fetches


def test_a_batchs_loss_is_fetched_only_where_it_is_read(monkeypatch):
    reads = lambda batch, logs: "loss" in logs and batch % 4 == 0 and logs["loss"] + logs["loss"]  # noqa: E731
    assert counting_fetches(only(on_train_batch_end=reads), monkeypatch) == 3


def test_an_epochs_mean_is_fetched_once(monkeypatch):
    callback = only(on_epoch_end=lambda epoch, logs: None, on_train_batch_end=lambda batch, logs: None)
    assert counting_fetches(callback, monkeypatch) == 1


def test_a_callback_without_a_batchs_end_costs_nothing_there():
    trainer = trainer_of()
    KerasStyle(only(on_epoch_begin=lambda epoch, logs: None)).attach(trainer)
    assert trainer.fire.iteration_completed is no_handlers
    assert trainer.fire.iteration_started is no_handlers


TWO = """
import torch, toys
import torch.distributed as dist
from camshaft import KerasStyle

class Stopper:
    def set_model(self, model):
        self.model = model

    def on_epoch_end(self, epoch, logs):
        means.append(logs["loss"])
        self.model.stop_training = dist.get_rank() == 1 and epoch == 1  # one of them alone wants to

means = []
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(toys.linear())
trainer = toys.trainer_of(model, toys.sgd(model, lr=0.0))
KerasStyle(Stopper()).attach(trainer)
first, second = toys.batches(2)
trainer.run([first] if dist.get_rank() == 0 else [(second[0][:2], second[1][:2])], max_epochs=5)
torch.save({"means": means, "epochs": trainer.state.epoch}, f"{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def test_two_processes_have_one_mean_and_end_together(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    environment = os.environ | {"PYTHONPATH": str(Path(toys.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (x, y), (x2, y2) = batches(2)
    squares = (linear()(torch.cat([x, x2[:2]])) - torch.cat([y, y2[:2]])).square().mean(1)
    mean = pytest.approx(squares.mean().item(), rel=1e-6)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert found == [{"means": [mean, mean], "epochs": 2}] * 2


# -- model, parameters and the end ------------------------------------------------------------------------------------


def test_it_is_told_how_long_the_run_is():
    assert recorded(data=3, max_epochs=2).params == {"epochs": 2, "steps": 3, "verbose": 0}


def test_its_model_has_what_keras_and_poutyne_have_and_is_the_network_otherwise():
    trainer = trainer_of()
    model, network = recorded(trainer, metrics_names=["accuracy"]).model, model_of(trainer)
    assert model.network is network
    assert model.optimizer is trainer.primary.optimizers[0]
    assert (model.device, model.metrics_names, model.stop_training) == (torch.device("cpu"), ["accuracy"], False)
    assert model.weight is network.weight
    assert torch.equal(model(torch.ones(1, 3)), network(torch.ones(1, 3)))


def test_what_its_model_does_not_have_is_named():
    model = recorded().model
    with pytest.raises(AttributeError, match="no 'get_weight_copies': it has network, optimizer, device, metrics_names"):
        model.get_weight_copies()


@pytest.mark.parametrize(
    ("method", "iterations"),
    [("on_train_begin", 0), ("on_epoch_begin", 3), ("on_train_batch_end", 5), ("on_epoch_end", 6)],
)
def test_it_ends_the_run_by_stop_training(method, iterations):
    trainer, recorder, calls = trainer_of(), Recorder(), []

    def stop(*args):
        calls.append(args)
        recorder.model.stop_training = method == "on_train_begin" or len(calls) == {"on_train_batch_end": 5}.get(method, 2)

    setattr(recorder, method, stop)
    KerasStyle(recorder).attach(trainer)
    state = trainer.run(batches(3), max_epochs=4)
    assert (state.iteration, state.stop_reason) == (iterations, "Recorder has set model.stop_training")
    assert len(recorder.named("on_train_end")) == 1


def test_the_next_run_is_an_ordinary_one():
    trainer, recorder = trainer_of(), Recorder()
    stops = iter([False, True])
    recorder.on_epoch_end = lambda epoch, logs: setattr(recorder.model, "stop_training", next(stops, False))
    KerasStyle(recorder).attach(trainer)
    assert trainer.run(batches(2), max_epochs=9).epoch == 2
    assert trainer.run(batches(2), max_epochs=5).epoch == 5
    assert trainer.state.stop_reason is None


# -- state ------------------------------------------------------------------------------------------------------------


def test_its_state_travels_past_the_beginning_of_the_resumed_run(tmp_path):
    first, second, callback = trainer_of(), trainer_of(), Stateful()
    for trainer, counter in ((first, Stateful()), (second, callback)):
        KerasStyle(counter).attach(trainer)
        CheckpointRotation(tmp_path).attach(trainer)
    first.run(batches(2), max_epochs=2)
    second.handlers["CheckpointRotation"].resume()
    assert callback.epochs == 2
    second.run(batches(2), max_epochs=5)
    assert callback.epochs == 5


def test_a_second_run_begins_afresh():
    trainer, callback = trainer_of(), Stateful()
    KerasStyle(callback).attach(trainer)
    for max_epochs in (2, 3):
        trainer.state.max_epochs = None
        trainer.run(batches(2), max_epochs=max_epochs)
        assert callback.epochs == max_epochs


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_an_epoch_that_is_resumed_in_its_middle_has_its_whole_mean(stop, tmp_path):
    whole = recorded(data=4, max_epochs=2).named("on_epoch_end")
    first, recorder = trainer_of(), Recorder()
    KerasStyle(Recorder()).attach(first)
    CheckpointRotation(tmp_path).attach(first)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda e: e.terminate())
    first.run(batches(4), max_epochs=2)
    second = trainer_of()
    KerasStyle(recorder).attach(second)
    CheckpointRotation(tmp_path).attach(second).resume()
    second.run(batches(4), max_epochs=2)
    assert recorder.named("on_epoch_end") == whole[stop // 4 :]
    assert recorder.named("on_train_batch_begin")[0][0] == stop % 4


def test_a_state_that_a_checkpoint_cannot_carry_is_named(tmp_path):
    callback = Stateful()
    callback.state_dict = lambda: {"epochs": object()}
    trainer = trainer_of()
    KerasStyle(callback).attach(trainer)
    CheckpointRotation(tmp_path).attach(trainer)
    with pytest.raises(TypeError, match=re.escape("Stateful.state_dict()['epochs'] is a builtins.object")):
        trainer.run(batches(2))


def test_several_callbacks_have_names_of_their_own():
    trainer = trainer_of()
    KerasStyle(Recorder()).attach(trainer)
    KerasStyle(Stateful()).attach(trainer)
    assert list(trainer.handlers) == ["KerasStyle/Recorder", "KerasStyle/Stateful"]
    with pytest.raises(ValueError, match="'KerasStyle/Stateful' is attached already"):
        KerasStyle(Stateful()).attach(trainer)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_an_object_with_none_of_the_methods_is_an_error():
    with pytest.raises(TypeError, match="at least one of the methods on_train_begin, .*, on_train_end; got Only with none"):
        KerasStyle(only(on_test_begin=lambda logs: None))


def test_a_class_in_place_of_an_object_is_an_error():
    with pytest.raises(TypeError, match=r"must be an object, got the class Stateful; make one: KerasStyle\(Stateful\(...\)\)"):
        KerasStyle(Stateful)


def test_an_unknown_style_is_an_error():
    with pytest.raises(ValueError, match="style must be 'keras', 'poutyne' or None, got 'torch'"):
        KerasStyle(Recorder(), style="torch")


# -- the libraries' own -----------------------------------------------------------------------------------------------


def from_poutyne(name):
    """One of Poutyne's own classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it and what it imports warn of is not ours
        return getattr(pytest.importorskip("poutyne"), name)


def test_poutynes_early_stopping_stops_at_the_epoch_at_which_poutyne_would():
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


def test_poutynes_clipping_clips_like_the_loop_written_by_hand():
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


def test_poutynes_schedule_goes_on_after_a_resume(tmp_path):
    def trained(epochs):
        trainer = trainer_of()
        KerasStyle(from_poutyne("ExponentialLR")(gamma=0.5)).attach(trainer)
        CheckpointRotation(tmp_path).attach(trainer).resume()
        trainer.run(batches(2), max_epochs=epochs)
        return trainer.primary.optimizers[0].param_groups[0]["lr"]

    assert [trained(1), trained(3)] == [0.05, 0.0125]


def test_a_base_class_with_methods_that_do_nothing_has_none():
    with pytest.raises(TypeError, match="got Callback with none"):
        KerasStyle(from_poutyne("Callback")())


def with_keras(script, folder):
    """What a script over Keras prints; in a process of its own, for Keras changes the environment that it is imported in."""
    if find_spec("keras") is None:
        pytest.skip("Keras isn't installed")
    start = "import keras; from keras.callbacks import *; from toys import *; from camshaft import *; trainer = trainer_of()\n"
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(Path(toys.__file__).parent)}
    command = [sys.executable, "-c", start + textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_keras_early_stopping_stops_at_the_epoch_at_which_keras_would(tmp_path):
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


def test_it_stands_beside_the_packages_own(tmp_path):
    trainer, recorder = trainer_of(), Recorder()
    ExponentialMovingAverage(0.5).attach(trainer)
    KerasStyle(recorder).attach(trainer)
    plain = trainer_of()
    for one in (trainer, plain):
        one.run(batches(3))
    assert same(weights(model_of(trainer)), weights(model_of(plain)))
