"""Loggers of Ignite work on a trainer, with the optimizer step as their axis."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import toys
from ignite.handlers import TensorboardLogger
from ignite.handlers.tensorboard_logger import GradsScalarHandler, OptimizerParamsHandler, OutputHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import lr_scheduler
from toys import batches, model_of, scripted, trainer_of

from camshaft import Evaluation, Events, LRScheduling, StepEvents

STEP = StepEvents.OPTIMIZER_STEP_COMPLETED


def optimizer_step(engine, event):
    """The x axis of a curve."""
    return engine.state.optimizer_step


def curves(folder):
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_the_tensorboard_logger_writes_the_loss_on_the_given_axis(tmp_path):
    trainer, losses = trainer_of(accumulation_steps=2), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda e: losses.append(e.state.output.item()))
    with TensorboardLogger(log_dir=tmp_path) as logger:
        logger.attach_output_handler(
            trainer,
            Events.ITERATION_COMPLETED(every=2),
            tag="train",
            output_transform=lambda loss: {"loss": loss},
            global_step_transform=optimizer_step,
        )
        trainer.run(batches(6))
    assert curves(tmp_path)["train/loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, start=1)]


def test_the_tensorboard_logger_writes_the_metrics_of_an_evaluation(tmp_path):
    trainer = trainer_of()
    Evaluation(scripted([0.5, 0.75]), [0]).attach(trainer)
    with TensorboardLogger(log_dir=tmp_path) as logger:
        handler = OutputHandler("epochs", metric_names="all", global_step_transform=optimizer_step)
        logger.attach(trainer, handler, Events.EPOCH_COMPLETED)
        trainer.run(batches(3), max_epochs=2)
    assert curves(tmp_path)["epochs/val/score"] == [(3, 0.5), (6, 0.75)]


def test_its_handlers_on_step_events_write_the_values_that_the_step_used(tmp_path):
    trainer = trainer_of(accumulation_steps=2)
    optimizer = trainer.primary.optimizers[0]
    LRScheduling(lr_scheduler.ExponentialLR(optimizer, 0.5)).attach(trainer)
    with TensorboardLogger(log_dir=tmp_path) as logger:
        trainer.add_event_handler(STEP, OptimizerParamsHandler(optimizer), logger, STEP)
        ready = StepEvents.GRADIENTS_READY
        trainer.add_event_handler(ready, GradsScalarHandler(model_of(trainer), reduction=torch.norm), logger, ready)
        trainer.run(batches(4))
    found = curves(tmp_path)
    assert found["lr/group_0"] == [(1, pytest.approx(0.1)), (2, pytest.approx(0.05))]
    assert [step for step, _ in found["grads_norm/weight"]] == [1, 2]


LOGGERS = {
    "wandb": """
        import wandb
        logger = WandBLogger(project="digits", mode="offline", dir=".")
        train(logger)
        wandb.log({}, commit=True)  # the values of a step are written when the step is complete
        print(wandb.run.summary["train/loss"], wandb.run.summary["_step"])
        logger.close()
    """,
    "mlflow": """
        import mlflow
        logger = MLflowLogger(tracking_uri="file:./mlruns")
        run_id = mlflow.active_run().info.run_id
        train(logger)
        logger.close()
        last = mlflow.tracking.MlflowClient("file:./mlruns").get_metric_history(run_id, "train loss")[-1]
        print(last.value, last.step)
    """,
    "clearml": """
        import json
        from pathlib import Path
        from clearml import Task
        Task.set_offline(True)
        logger = ClearMLLogger(project_name="digits", task_name="test")
        folder = Path(Task.current_task().get_offline_mode_folder())
        train(logger)
        logger.close()
        found = [json.loads(line) for path in folder.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
        found = [event for events in found for event in events if event.get("variant") == "loss"]
        print(found[-1]["value"], found[-1]["iter"])
    """,
}
"""One script for each logger. It prints the last loss and its step, and works offline."""

LOGGED = """
from ignite.handlers import ClearMLLogger, MLflowLogger, WandBLogger
from camshaft import Events
from toys import batches, trainer_of

def train(logger):
    trainer = trainer_of(accumulation_steps=2)
    logger.attach_output_handler(
        trainer, Events.ITERATION_COMPLETED(every=2), tag="train", output_transform=lambda loss: {"loss": loss.item()},
        global_step_transform=lambda engine, event: engine.state.optimizer_step,
    )
    trainer.run(batches(6))
    print(trainer.state.loss.item(), trainer.state.optimizer_step)
"""


@pytest.mark.parametrize("name", LOGGERS)
def test_the_logger_of_a_service_writes_offline_by_optimizer_step(name, tmp_path):
    if find_spec(name) is None:
        pytest.skip(f"{name} isn't installed")
    environment = os.environ | {"PYTHONPATH": str(Path(toys.__file__).parent), "HOME": str(tmp_path)}
    environment |= {"WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true", "CLEARML_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-c", LOGGED + textwrap.dedent(LOGGERS[name])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    pairs = [(float(line[0]), int(line[1])) for line in lines if len(line) == 2 and line[1].isdigit()]
    assert pairs[-1] == (pytest.approx(pairs[0][0]), 3)
