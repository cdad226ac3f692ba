"""The logs of callbacks of Keras and Poutyne."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from keras_callbacks import Recorder, only, recorded
from toys import batches, linear, scripted, sgd, trainer_of, without_gpus

from camshaft import Evaluation, Events, KerasStyle, create_gan_trainer, create_trainer
from camshaft.engines.fire import no_handlers


def test_the_logs_of_a_batch_hold_its_loss():
    trainer, losses = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.loss.item()))
    recorder = recorded(trainer, data=3)
    assert [dict(logs) for _, logs in recorder.named("on_train_batch_end")] == [{"loss": loss} for loss in losses]


def test_the_logs_of_an_epoch_hold_the_mean_over_its_samples():
    data = [*batches(2, size=4), *batches(1, size=2)]
    trainer, losses = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.loss.item()))
    KerasStyle(recorder := Recorder()).attach(trainer)
    trainer.run(data)
    mean = (4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10
    assert recorder.named("on_epoch_end") == [(0, {"loss": pytest.approx(mean)})]
    assert recorder.named("on_train_end") == [({"loss": pytest.approx(mean)},)]


def test_named_losses_are_in_the_logs():
    def compute_loss(model, batch):
        loss = model(batch[0]).square().mean()
        return {"loss": loss, "twice": 2 * loss}

    model = linear()
    recorder = recorded(create_trainer(model, sgd(model), None, compute_loss=compute_loss))
    for name in ("on_train_batch_end", "on_epoch_end"):
        logs = recorder.named(name)[-1][1]
        assert logs["twice"] == pytest.approx(2 * logs["loss"])


def test_the_losses_of_a_gan_are_in_the_logs():
    generator, critic = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    trainer, recorder = create_gan_trainer(generator, critic, sgd(generator), sgd(critic), latent=2), Recorder()
    KerasStyle(recorder).attach(trainer)
    trainer.run([x for x, _ in batches(3)])
    assert recorder.model.network is generator
    for name in ("on_train_batch_end", "on_epoch_end"):
        assert {"discriminator_loss", "generator_loss"} <= set(recorder.named(name)[-1][1]) <= set(trainer.state.losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_in_half_precision_are_summed_in_full_precision(dtype):
    values = [60_000.0, 60_000.0, 7.0]
    losses = iter(values)
    trainer = trainer_of(loss_fn=lambda y_pred, y: (y_pred.square().mean() * 0 + next(losses)).to(dtype))
    logs = recorded(trainer, data=3).named("on_epoch_end")[0][1]
    assert logs["loss"] == pytest.approx(torch.tensor(values).to(dtype).float().mean().item())


def test_new_metrics_are_in_the_logs_under_the_names_of_keras():
    trainer = trainer_of()
    Evaluation(scripted([0.5, 0.75]), [0], every=Events.EPOCH_COMPLETED(every=2)).attach(trainer)
    ends = recorded(trainer, max_epochs=4).named("on_epoch_end")
    assert [logs.get("val_score") for _, logs in ends] == [None, 0.5, None, 0.75]


def test_the_logs_of_poutyne_have_number_size_and_time():
    recorder = recorded(style="poutyne", max_epochs=2)
    batch, epoch = recorder.named("on_train_batch_end")[-1][1], recorder.named("on_epoch_end")[-1][1]
    assert list(batch) == ["batch", "size", "time", "loss"]
    assert (batch["batch"], batch["size"], epoch["epoch"]) == (2, 4, 2)
    assert 0 < batch["time"] <= epoch["time"] < 60


def test_the_logs_of_a_batch_behave_like_a_dict():
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
    """A tensor that counts how often its value is copied to the host."""

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


def test_the_loss_of_a_batch_is_fetched_only_if_it_is_read(monkeypatch):
    reads = lambda batch, logs: "loss" in logs and batch % 4 == 0 and logs["loss"] + logs["loss"]  # noqa: E731
    assert counting_fetches(only(on_train_batch_end=reads), monkeypatch) == 3


def test_the_mean_of_an_epoch_is_fetched_once(monkeypatch):
    callback = only(on_epoch_end=lambda epoch, logs: None, on_train_batch_end=lambda batch, logs: None)
    assert counting_fetches(callback, monkeypatch) == 1


def test_a_callback_without_batch_methods_adds_no_listener_per_batch():
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
        self.model.stop_training = dist.get_rank() == 1 and epoch == 1  # only one rank requests it

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


def test_two_processes_have_the_same_mean_and_stop_together(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    environment = without_gpus() | {"PYTHONPATH": str(Path(toys.__file__).parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (x, y), (x2, y2) = batches(2)
    squares = (linear()(torch.cat([x, x2[:2]])) - torch.cat([y, y2[:2]])).square().mean(1)
    mean = pytest.approx(squares.mean().item(), rel=1e-6)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert found == [{"means": [mean, mean], "epochs": 2}] * 2
