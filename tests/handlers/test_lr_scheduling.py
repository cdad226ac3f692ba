"""Any torch scheduler, stepped per optimizer step, per epoch or on a metric."""

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from torch.optim import lr_scheduler
from toys import batches, linear, scripted, sgd, trainer_of

from camshaft import Evaluation, LRHistory, LRScheduling, StepEvents

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=7),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


def set_up(make, **options):
    """A trainer with a schedule, and the history of its learning rates."""
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    LRScheduling(make(optimizer), **options).attach(trainer)
    return trainer, LRHistory().attach(trainer)


def rates(history):
    return [rate for _, rate in history.history["lr"]]


def by_hand(make, counts, per_step):
    """The rate of each step of a hand-written loop that steps the scheduler per step or per epoch."""
    optimizer = sgd(linear())
    scheduler, used = make(optimizer), []
    for count in counts:
        for _ in range(count):
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if per_step:
                scheduler.step()
        if not per_step:
            scheduler.step()
    return used


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_any_scheduler_is_stepped_as_in_a_hand_written_loop(name, every):
    trainer, history = set_up(SCHEDULERS[name], every=every)
    trainer.run(batches(3), max_epochs=2)
    assert rates(history) == by_hand(SCHEDULERS[name], [3, 3], every == "step")


def test_it_steps_once_per_window():
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer, accumulation_steps=2, scheduler=SCHEDULERS["StepLR"](optimizer))
    history = LRHistory().attach(trainer)
    trainer.run(batches(7))
    assert rates(history) == [0.1, 0.1, 0.05, 0.05]


def test_a_skipped_step_does_not_advance_the_schedule():
    trainer, history = set_up(SCHEDULERS["LambdaLR"])
    second = StepEvents.GRADIENTS_READY(lambda engine, _: engine.state.iteration == 2)
    trainer.add_event_handler(second, lambda e: e.skip_step_if(torch.tensor(True)))
    trainer.run(batches(4))
    assert rates(history) == by_hand(SCHEDULERS["LambdaLR"], [3], True)


def test_a_users_handler_on_the_step_sees_the_rate_that_the_step_used():
    trainer, _ = set_up(SCHEDULERS["LambdaLR"])
    seen = []
    rate = lambda e: seen.append(e.learning_rates("model")[0][1])  # noqa: E731
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, rate)
    trainer.run(batches(3))
    assert seen == by_hand(SCHEDULERS["LambdaLR"], [3], True)


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1, min_lr=5e-3)


@pytest.mark.parametrize("order", ["schedule first", "evaluation first"])
def test_a_plateau_scheduler_uses_the_metric_of_the_same_epoch(order):
    scores = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    attach = [
        lambda: LRScheduling(plateau(optimizer), metric="val/score").attach(trainer),
        lambda: Evaluation(scripted(scores), [0]).attach(trainer),
    ]
    for one in attach if order == "schedule first" else reversed(attach):
        one()
    seen = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(optimizer.param_groups[0]["lr"]))
    trainer.run(batches(1), max_epochs=6)
    twin = sgd(linear())
    scheduler, expected = plateau(twin), []
    for score in scores:
        scheduler.step(score)
        expected.append(twin.param_groups[0]["lr"])
    assert seen == expected
    assert seen[-1] == 5e-3


def test_a_metric_inside_an_epoch_is_used_once_when_it_is_evaluated():
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    scheduler, got = plateau(optimizer), []
    step = scheduler.step
    scheduler.step = lambda metrics: (got.append((trainer.state.iteration, metrics)), step(metrics))
    LRScheduling(scheduler, metric="val/score").attach(trainer)
    Evaluation(scripted([5.0, 4.0, 3.0]), [0], every=Events.ITERATION_COMPLETED(every=2)).attach(trainer)
    trainer.run(batches(3), max_epochs=2)
    assert got == [(2, 5.0), (4, 4.0), (6, 3.0)]


def test_a_metric_that_never_appears_is_an_error_that_names_the_existing_ones():
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    LRScheduling(plateau(optimizer), metric="val/lots").attach(trainer)
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    with pytest.raises(ValueError, match="LRScheduling: no metric named 'val/lots' by the end of epoch 1.*'val/score'"):
        trainer.run(batches(2))


def test_each_of_several_optimizers_has_its_schedule():
    model = linear()
    optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=1.0)]
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    trainer = trainer_of(model, optimizers, scheduler=schedulers)
    history = LRHistory().attach(trainer)
    trainer.run(batches(2))
    assert history.history == {"lr/0": [(1, 0.1), (2, 0.05)], "lr/1": [(1, 1.0), (2, 0.5)]}


def test_on_a_plain_ignite_engine_it_says_what_it_needs():
    with pytest.raises(TypeError, match=r"LRScheduling needs a trainer from create_trainer\(\), got Engine"):
        LRScheduling(SCHEDULERS["StepLR"](sgd(linear())), every="epoch").attach(Engine(print))


def test_after_detaching_it_steps_nothing():
    trainer, history = set_up(SCHEDULERS["LambdaLR"])
    trainer.handlers["LRScheduling"].detach()
    trainer.run(batches(3))
    assert rates(history) == [0.1, 0.1, 0.1]


def of_another_optimizer():
    return LRScheduling(lr_scheduler.StepLR(sgd(linear()), 1)).attach(trainer_of())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: LRScheduling(3), TypeError, "scheduler must be a torch.optim.lr_scheduler, got int without 'step'"),
        (
            lambda: LRScheduling(SCHEDULERS["StepLR"](sgd(linear())), every="batch"),
            ValueError,
            "'step' or 'epoch', got 'batch'",
        ),
        (lambda: LRScheduling(plateau(sgd(linear()))), ValueError, "ReduceLROnPlateau follows a metric: attach LRScheduling"),
        (of_another_optimizer, ValueError, "scheduler StepLR was made for another optimizer than the trainer's"),
    ],
)
def test_wrong_arguments_are_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_an_ignite_metric_on_the_trainer_is_used_in_the_same_epoch():
    trainer = trainer_of()
    Average().attach(trainer, "loss")
    seen = []
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.primary.optimizers[0])
    plateau.step = seen.append
    LRScheduling(plateau, metric="loss").attach(trainer)
    means = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: means.append(float(e.state.metrics["loss"])))
    trainer.run(batches(3), max_epochs=3)
    assert seen == means
    assert len(seen) == 3
