"""Ignite's own handlers and metrics on a trainer."""

import io

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import (
    Checkpoint,
    DiskSaver,
    EarlyStopping,
    EpochOutputStore,
    ProgressBar,
    TerminateOnNan,
    Timer,
    global_step_from_engine,
)
from ignite.metrics import Average, Loss, MeanSquaredError, RunningAverage
from torch.nn.functional import mse_loss
from toys import batches, model_of, same, trainer_of, weights
from training_loops import train_and_record_losses

from camshaft import (
    StepEvents,
)


def test_a_metric_attached_to_the_trainer_receives_the_output():
    trainer = trainer_of()
    Average().attach(trainer, "mean loss")
    trainer.run(batches(3))
    losses, _ = train_and_record_losses(batches(3))
    assert float(trainer.state.metrics["mean loss"]) == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_metrics_of_predictions_use_output_transform():
    trainer = trainer_of(output_transform=lambda x, y, y_pred, loss: (y_pred, y))
    MeanSquaredError().attach(trainer, "mse")
    Loss(mse_loss).attach(trainer, "loss")
    trainer.run(batches(3))
    losses, _ = train_and_record_losses(batches(3))
    assert trainer.state.metrics["mse"] == pytest.approx(2 * sum(losses) / 3, rel=1e-5)  # Ignite sums over outputs
    assert trainer.state.metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_running_average_averages_the_loss():
    trainer, seen = trainer_of(), []
    RunningAverage(output_transform=float, alpha=0.5).attach(trainer, "running")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(float(e.state.metrics["running"])))
    trainer.run(batches(3))
    first, second, third = train_and_record_losses(batches(3))[0]
    expected = [first, (first + second) / 2, ((first + second) / 2 + third) / 2]
    assert seen == pytest.approx(expected, rel=1e-6)


def test_progress_bar_shows_the_loss():
    trainer, text = trainer_of(), io.StringIO()
    RunningAverage(output_transform=float).attach(trainer, "running")
    ProgressBar(file=text, ncols=80).attach(trainer, ["running"])
    trainer.run(batches(3))
    assert "3/3" in text.getvalue() or "[2/3]" in text.getvalue()
    assert "running=" in text.getvalue()


def test_a_timer_measures_steps():
    trainer = trainer_of()
    timer = Timer(average=True)
    timer.attach(
        trainer,
        start=Events.EPOCH_STARTED,
        resume=StepEvents.OPTIMIZER_STEP_STARTED,
        pause=StepEvents.OPTIMIZER_STEP_COMPLETED,
        step=StepEvents.OPTIMIZER_STEP_COMPLETED,
    )
    trainer.run(batches(3))
    assert timer.step_count == 3
    assert timer.value() > 0


def test_terminate_on_nan_stops_the_run():
    trainer = trainer_of()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    data = batches(4)
    data[1][0][0, 0] = float("nan")
    trainer.run(data)
    assert trainer.state.iteration == 2
    assert trainer.state.stop_reason == "terminate() was called in epoch 1, iteration 2"


def test_early_stopping_stops_the_trainer():
    trainer, scores = trainer_of(), iter([3.0, 2.0, 1.0, 0.0])
    stopping = EarlyStopping(patience=2, score_function=lambda engine: next(scores), trainer=trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, stopping)
    trainer.run(batches(2), max_epochs=10)
    assert trainer.state.epoch == 3


def test_checkpoint_saves_with_the_optimizer_step_in_the_file_name(tmp_path):
    trainer = trainer_of(accumulation_steps=2)
    saver = Checkpoint(
        {"model": model_of(trainer), "trainer": trainer},
        DiskSaver(tmp_path, create_dir=True),
        global_step_transform=lambda engine, _: engine.state.optimizer_step,
        n_saved=None,
    )
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED(every=2), saver)
    trainer.run(batches(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_2.pt", "checkpoint_4.pt"]
    saved = torch.load(tmp_path / "checkpoint_4.pt", weights_only=True)
    assert torch.equal(saved["model"]["weight"], model_of(trainer).weight)


def test_checkpoint_loads_into_a_new_trainer(tmp_path):
    trainer = trainer_of()
    to_save = {"model": model_of(trainer), "trainer": trainer}
    saver = Checkpoint(to_save, DiskSaver(tmp_path), global_step_transform=global_step_from_engine(trainer))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), saver)
    trainer.run(batches(3), max_epochs=3)
    fresh, epochs = trainer_of(), []
    Checkpoint.load_objects({"model": model_of(fresh), "trainer": fresh}, torch.load(tmp_path / saver.last_checkpoint))
    fresh.add_event_handler(Events.EPOCH_STARTED, lambda e: epochs.append(e.state.epoch))
    fresh.run(batches(3))
    assert epochs == [2, 3]
    assert same(weights(model_of(fresh)), weights(model_of(trainer)))


def test_epoch_output_store_collects_outputs():
    trainer = trainer_of()
    store = EpochOutputStore(output_transform=float)
    store.attach(trainer, "losses")
    trainer.run(batches(3))
    assert store.data == pytest.approx(train_and_record_losses(batches(3))[0], rel=1e-6)
