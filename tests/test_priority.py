"""The order in which handlers of one event run."""

import pytest
import torch
from ignite.engine import Events
from toys import batches, scripted, trainer_of

from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Evaluation,
    ExponentialMovingAverage,
    GradientClipping,
    Handler,
    LRHistory,
    LRScheduling,
    NonFiniteGuard,
    StepEvents,
    TensorBoard,
    on,
)


def is_user_function(function):
    """Whether a function is not one of the trainer's own."""
    return not getattr(function, "__module__", "").startswith("camshaft.")


def order_of(trainer, event):
    """The owners of an event's handlers, in the order in which they run."""
    entries = [getattr(entry[0], "handler", entry[0]) for entry in trainer._event_handlers[event]]
    owners = [getattr(function, "__self__", None) for function in entries]
    visible = [
        owner for owner, function in zip(owners, entries, strict=True) if owner is not None or is_user_function(function)
    ]
    names = ["user" if owner is None else owner.name for owner in visible]
    return list(dict.fromkeys(names))


def functions_that_attach(trainer, folder):
    """Functions that each attach a handler; all of the handlers share events."""
    optimizer = trainer.primary.optimizers[0]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    exponential = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    events = (StepEvents.GRADIENTS_READY, StepEvents.OPTIMIZER_STEP_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED)
    return [
        lambda: Evaluation(scripted([1.0]), [0]).attach(trainer),
        lambda: LRScheduling(plateau, metric="val/score").attach(trainer, "plateau"),
        lambda: LRScheduling(exponential).attach(trainer, "schedule"),
        lambda: [trainer.add_event_handler(event, lambda engine: None) for event in events],
        lambda: NonFiniteGuard().attach(trainer),
        lambda: GradientClipping(1.0).attach(trainer),
        lambda: LRHistory().attach(trainer),
        lambda: ExponentialMovingAverage().attach(trainer),
        lambda: EarlyStopping("val/score").attach(trainer),
        lambda: TensorBoard(folder / "board").attach(trainer),
        lambda: CheckpointRotation(folder / "checkpoints").attach(trainer),
    ]


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_handlers_does_not_depend_on_the_order_of_attachment(seed, tmp_path):
    trainer = trainer_of()
    todo = functions_that_attach(trainer, tmp_path)
    for number in torch.randperm(len(todo), generator=torch.Generator().manual_seed(seed)).tolist():
        todo[number]()
    at_step = [name for name in order_of(trainer, StepEvents.OPTIMIZER_STEP_COMPLETED) if name != "TensorBoard"]
    at_epoch = [name for name in order_of(trainer, Events.EPOCH_COMPLETED) if name != "TensorBoard"]
    assert order_of(trainer, StepEvents.GRADIENTS_READY) == ["user", "NonFiniteGuard", "GradientClipping"]
    assert at_step == ["LRHistory", "ExponentialMovingAverage", "user", "schedule"]
    assert at_epoch == ["Evaluation/val", "plateau", "user", "EarlyStopping", "CheckpointRotation"]


@pytest.mark.parametrize("reverse", [False, True])
def test_logging_runs_after_early_stopping_and_before_saving_at_the_end_of_an_epoch(reverse, tmp_path):
    """Checks the order during a run: the log and the checkpoint contain the results of the handlers before them."""
    trainer, order = trainer_of(), []

    def spy(cls, method):
        def spied(self, *args, **kwargs):
            order.append(cls.__name__)
            return getattr(cls, method)(self, *args, **kwargs)

        return type(cls.__name__, (cls,), {method: spied})

    evaluation = spy(Evaluation, "evaluate")(scripted([1.0]), [0])
    judge = spy(EarlyStopping, "judge")("val/score")
    board = spy(TensorBoard, "write_metrics")(tmp_path / "board")
    save = spy(CheckpointRotation, "save_if_requested_after_epoch")(tmp_path / "checkpoints")
    handlers = [evaluation, judge, board, save]
    for handler in reversed(handlers) if reverse else handlers:
        handler.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: order.append("user"))
    done = []
    trainer.add_event_handler(Events.COMPLETED, lambda: done.append(list(order)))
    trainer.run(batches(3))
    epoch = [name for name in done[0] if name != "TensorBoard" or "user" in order]
    assert epoch[:5] == ["Evaluation", "user", "EarlyStopping", "TensorBoard", "CheckpointRotation"]


def test_user_handlers_run_with_user_functions_in_the_order_of_attachment():
    order = []

    class Named(Handler):
        @on(StepEvents.GRADIENTS_READY)
        def record(self, engine):
            order.append(self.name)

    trainer = trainer_of(clip_grad_norm=1.0)
    Named().attach(trainer, "a")
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda e: order.append(e.state.grad_norm))
    Named().attach(trainer, "b")
    trainer.run(batches(1))
    assert order == ["a", None, "b"]
