"""`trainer.explain()`: the training cycle as text."""

import pytest
import torch
from ignite.engine import Events
from torch.nn.functional import mse_loss
from toys import linear, sgd, trainer_of

import camshaft
from camshaft import (
    CheckpointRotation,
    GradientAccumulation,
    GradientClipping,
    LRScheduling,
    MixedPrecision,
    Phase,
    StepEvents,
    TensorBoard,
    Trainer,
    create_trainer,
)


def full_trainer():
    model = linear()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trainer = create_trainer(
        model,
        optimizer,
        mse_loss,
        amp="bf16",
        accumulation_steps=4,
        clip_grad_norm=1.5,
        scheduler=scheduler,
        partial_window="drop",
    )

    @trainer.on(StepEvents.GRADIENTS_CLIPPED(every=100))
    def log_norm(engine):
        pass

    return trainer


def test_explain_returns_the_cycle_as_text():
    assert full_trainer().explain() == "\n".join(
        [
            "model: Linear on cpu, SGD, 4 batches a step (a shorter last window: drop), bfloat16",
            "STARTED",
            "    LRScheduling(StepLR).start",
            "  EPOCH_STARTED",
            "    ITERATION_STARTED",
            "      FORWARD_STARTED",
            "      FORWARD_COMPLETED",
            "      BACKWARD_STARTED",
            "      BACKWARD_COMPLETED",
            "      GRADIENTS_READY",
            "          GradientClipping(max_norm=1.5).clip  [changes gradients]",
            "      GRADIENTS_CLIPPED",
            "          log_norm  (every=100)",
            "      OPTIMIZER_STEP_STARTED",
            "      OPTIMIZER_STEP_COMPLETED",
            "          LRScheduling(StepLR).step_in_phase",
            "      OPTIMIZER_STEP_SKIPPED",
            "    ITERATION_COMPLETED",
            "  EPOCH_COMPLETED",
            "COMPLETED",
        ]
    )


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (StepEvents.GRADIENTS_READY(every=10), "(every=10)"),
        (StepEvents.GRADIENTS_READY(once=3), "(once=[3])"),
        (StepEvents.GRADIENTS_READY(before=5), "(before=5)"),
        (StepEvents.GRADIENTS_READY(after=2, before=5), "(before=5, after=2)"),
        (StepEvents.GRADIENTS_READY(every=2, after=4), "(every=2, after=4)"),
        (StepEvents.GRADIENTS_READY(phase="model"), "(phase='model')"),
        (StepEvents.GRADIENTS_READY(phase="model", every=3), "(phase='model', every=3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_explain_shows_filters(event, expected):
    trainer = trainer_of()

    def my_handler(engine):
        pass

    trainer.add_event_handler(event, my_handler)
    line = next(line for line in trainer.explain().splitlines() if "my_handler" in line)
    assert sorted(line.strip().removeprefix("my_handler  (")[:-1].split(", ")) == sorted(expected[1:-1].split(", "))


def test_explain_names_a_filter_that_is_a_function():
    def weekends(engine, clock):
        return False

    trainer = trainer_of()
    trainer.add_event_handler(Events.EPOCH_COMPLETED(weekends), print)
    assert "print  (weekends)" in trainer.explain()


def test_explain_shows_rare_events_only_if_they_have_handlers():
    trainer = trainer_of()
    assert "TERMINATE" not in trainer.explain()
    trainer.add_event_handler(Events.TERMINATE, lambda: None)
    assert "TERMINATE" in trainer.explain()


def test_explain_describes_internal_filters_in_words(tmp_path):
    trainer = trainer_of()
    CheckpointRotation(tmp_path, keep_best=1, metric="score").attach(trainer)
    camshaft.EarlyStopping("score").attach(trainer)
    TensorBoard(tmp_path / "board").attach(trainer)
    lines = [line.strip() for line in trainer.explain().splitlines()]
    expected = ["CheckpointRotation.save_if_requested  (when due)", "EarlyStopping.judge  (when new)"]
    assert {*expected, "TensorBoard.write_metrics  (when metrics are new)"} <= set(lines)
    assert not any("_is_" in line or "MetricWatch" in line for line in lines)
    assert {"CheckpointRotation.check_at_end", "EarlyStopping.check_at_end"} <= set(lines)


def test_explain_shows_the_name_and_the_class_of_a_handler():
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    LRScheduling(torch.optim.lr_scheduler.StepLR(optimizer, 1)).attach(trainer, "halving")
    GradientClipping(1.0).attach(trainer, "GradientClipping2")
    text = trainer.explain()
    assert "    halving: LRScheduling(StepLR).step_in_phase" in text
    assert "    GradientClipping2(max_norm=1.0).clip" in text


def test_explain_shows_events_without_a_fixed_time_at_the_end():
    trainer = trainer_of()
    for event in (Events.INTERRUPT, Events.EXCEPTION_RAISED, Events.TERMINATE):
        trainer.add_event_handler(event, lambda *_: None)
    names = [line.strip() for line in trainer.explain().splitlines() if line.strip().isupper()]
    assert names[-5:] == ["EPOCH_COMPLETED", "TERMINATE", "COMPLETED", "INTERRUPT", "EXCEPTION_RAISED"]


def test_explain_shows_every_phase():
    text = two_phases(interval=2).explain().splitlines()
    assert text[0] == "first: Linear on cpu, SGD"
    assert text[1] == "second: Linear on cpu, SGD, after every 2 steps of first"


def test_explain_shows_arguments_as_the_handlers_they_attach():
    model = linear()
    short = create_trainer(
        model, sgd(model), mse_loss, amp="bf16", accumulation_steps=3, clip_grad_norm=0.5, clip_grad_value=0.1
    )
    long = trainer_of()
    MixedPrecision("bf16").attach(long)
    GradientAccumulation(3).attach(long)
    GradientClipping(0.5, clip_value=0.1).attach(long)
    assert short.explain() == long.explain()
    assert list(short.handlers) == list(long.handlers) == ["MixedPrecision", "GradientAccumulation", "GradientClipping"]


def two_phases(interval=1, **second_options):
    first, second = linear(), linear()

    def objective(model):
        return lambda engine, batch: mse_loss(model(batch[0]), batch[1])

    return Trainer(
        [
            Phase("first", first, sgd(first), objective(first)),
            Phase("second", second, sgd(second), objective(second), interval=interval, **second_options),
        ]
    )
