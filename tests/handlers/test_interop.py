"""Handlers, metrics, schedulers and loggers of Ignite, torch and timm work on a trainer, on the right clock."""

import inspect
import io
import math

import ignite.handlers
import pytest
import torch
from ignite.handlers import (
    BasicTimeProfiler,
    Checkpoint,
    EMAHandler,
    FastaiLRFinder,
    HandlersTimeProfiler,
    PiecewiseLinear,
    ProgressBar,
    TerminateOnNan,
    Timer,
    create_lr_scheduler_with_warmup,
)
from ignite.metrics import Accuracy, MeanSquaredError, RunningAverage
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from toys import batches, linear, model_of, same, scripted, sgd, trainer_of, weights

from camshaft import Evaluation, Events, LRHistory, LRScheduling, StepEvents, create_evaluator

STEP = StepEvents.OPTIMIZER_STEP_COMPLETED


def rates(trainer, **run):
    """The rate that each optimizer step of a run used."""
    history = LRHistory().attach(trainer)
    trainer.run(batches(8), **run)
    return [rate for _, rate in history.history["lr"]]


# -- Ignite's handlers ------------------------------------------------------------------------------------------------


def test_the_progress_bar_counts_the_iterations():
    trainer, text = trainer_of(), io.StringIO()
    ProgressBar(persist=True, file=text, ncols=100).attach(trainer, output_transform=lambda loss: {"loss": loss})
    trainer.run(batches(3), max_epochs=2)
    assert "[2/2]" in text.getvalue()
    assert "loss=" in text.getvalue()


def test_a_timer_can_count_optimizer_steps():
    trainer, timer = trainer_of(accumulation_steps=2), Timer(average=True)
    timer.attach(trainer, start=Events.STARTED, step=STEP)
    trainer.run(batches(5))
    assert timer.step_count == 3
    assert timer.value() > 0


@pytest.mark.parametrize("clock", [Events.EPOCH_COMPLETED, STEP(every=3)])
def test_checkpoints_of_ignite_can_be_written_on_both_clocks_and_loaded(clock, tmp_path):
    model = linear()
    optimizer = sgd(model, momentum=0.9)
    trainer = trainer_of(model, optimizer)
    step = lambda engine, _: engine.state.optimizer_step  # noqa: E731
    checkpoint = Checkpoint({"model": model, "optimizer": optimizer}, tmp_path, n_saved=None, global_step_transform=step)
    trainer.add_event_handler(clock, checkpoint)
    trainer.run(batches(3), max_epochs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_3.pt", "checkpoint_6.pt"]
    fresh = nn.Linear(3, 2)
    Checkpoint.load_objects({"model": fresh}, torch.load(tmp_path / "checkpoint_6.pt", weights_only=True))
    assert same(weights(fresh), weights(model))


def test_checkpoint_of_ignite_uses_a_metric_of_an_evaluation(tmp_path):
    trainer = trainer_of()
    Evaluation(scripted([1.0, 3.0, 2.0]), [0]).attach(trainer)
    score = lambda engine: engine.state.metrics["val/score"]  # noqa: E731
    checkpoint = Checkpoint({"model": model_of(trainer)}, tmp_path, score_function=score, score_name="score")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    trainer.run(batches(2), max_epochs=3)
    assert [path.name for path in tmp_path.iterdir()] == ["model_score=3.0000.pt"]


def test_early_stopping_of_ignite_ends_the_run():
    trainer, evaluator = trainer_of(), scripted([3.0, 2.0, 1.0])
    score = lambda engine: engine.state.metrics["score"]  # noqa: E731
    stopping = ignite.handlers.EarlyStopping(patience=2, score_function=score, trainer=trainer)
    evaluator.add_event_handler(Events.COMPLETED, stopping)
    Evaluation(evaluator, [0]).attach(trainer)
    state = trainer.run(batches(2), max_epochs=9)
    assert (state.epoch, state.stop_reason) == (3, "terminate() was called in epoch 3, iteration 6")


def test_terminate_on_nan_ends_the_run_at_the_iteration():
    losses = iter([1.0, 1.0, float("nan"), 1.0])
    trainer = trainer_of(loss_fn=lambda y_pred, y: (y_pred - y).square().mean() * next(losses))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    assert trainer.run(batches(4)).iteration == 3


def test_ignites_ema_handler_updates_once_per_optimizer_step():
    model, seen = linear(), []
    trainer = trainer_of(model, accumulation_steps=2)
    average = EMAHandler(model, momentum=0.5)
    average.attach(trainer, event=STEP)
    trainer.add_event_handler(STEP, lambda: seen.append(weights(model)))
    expected = weights(model)
    trainer.run(batches(5))
    for after in seen:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, after, strict=True)]
    assert len(seen) == 3
    torch.testing.assert_close(weights(average.ema_model), expected)


def test_the_learning_rate_finder_restores_everything():
    model = linear()
    optimizer = sgd(model, lr=1e-3)
    trainer, finder, before = trainer_of(model, optimizer), FastaiLRFinder(), weights(model)
    to_save = {"model": model, "optimizer": optimizer}
    with finder.attach(trainer, to_save=to_save, end_lr=1e6, num_iter=20, diverge_th=2.0) as finding:
        finding.run(batches(20))
    assert len(finder.get_results()["lr"]) > 5
    assert same(weights(model), before)
    assert trainer.run(batches(3)).optimizer_step == 3


def test_the_profilers_see_the_handlers_of_both_clocks():
    trainer = trainer_of(accumulation_steps=2, clip_grad_norm=1.0)

    @trainer.on(StepEvents.GRADIENTS_READY)
    def look(engine):
        pass

    basic, by_handler = BasicTimeProfiler(), HandlersTimeProfiler()
    basic.attach(trainer)
    trainer.run(batches(4))
    assert basic.get_results()["processing_stats"]["total"] > 0
    trainer.state.max_epochs = None
    by_handler.attach(trainer)
    trainer.run(batches(4))
    found = {row[1] for row in by_handler.get_results() if "look" in row[0] or row[0] == "GradientClipping.clip"}
    assert found == {"GRADIENTS_READY"}


# -- Ignite's metrics -------------------------------------------------------------------------------------------------


def test_a_metric_on_the_trainer_covers_the_epoch():
    trainer, pairs = trainer_of(output_transform=lambda x, y, y_pred, loss: (y_pred, y)), []
    MeanSquaredError().attach(trainer, "error")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: pairs.append(e.state.output))
    trainer.run(batches(3))
    y_pred, y = (torch.cat(column) for column in zip(*pairs, strict=True))
    assert trainer.state.metrics["error"] == pytest.approx((y_pred - y).square().sum(1).mean().item(), rel=1e-5)


def test_a_running_average_of_the_loss_equals_the_hand_written_one():
    trainer, losses = trainer_of(), []
    RunningAverage(output_transform=lambda loss: loss, alpha=0.5).attach(trainer, "average")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output.item()))
    trainer.run(batches(3))
    expected = losses[0]
    for loss in losses[1:]:
        expected = 0.5 * expected + 0.5 * loss
    assert trainer.state.metrics["average"] == pytest.approx(expected)


# -- Ignite's schedules -----------------------------------------------------------------------------------------------


def test_piecewise_linear_counts_the_optimizer_steps_of_its_event():
    trainer = trainer_of(accumulation_steps=2)
    schedule = PiecewiseLinear(trainer.primary.optimizers[0], "lr", milestones_values=[(0, 0.0), (2, 1.0), (4, 0.0)])
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_STARTED, schedule)
    assert rates(trainer) == [0.0, 0.5, 1.0, 0.5]


def test_ignites_wrapper_of_a_torch_schedule_steps_after_the_step():
    trainer = trainer_of(accumulation_steps=2)
    schedule = ignite.handlers.LRScheduler(lr_scheduler.ExponentialLR(trainer.primary.optimizers[0], 0.5))
    trainer.add_event_handler(STEP, schedule)
    assert rates(trainer) == [0.1, 0.05, 0.025, 0.0125]


def test_ignites_warm_up_before_a_torch_schedule():
    trainer = trainer_of(accumulation_steps=2)
    after = lr_scheduler.ExponentialLR(trainer.primary.optimizers[0], 0.5)
    schedule = create_lr_scheduler_with_warmup(after, warmup_start_value=0.0, warmup_duration=2)
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_STARTED, schedule)
    assert rates(trainer) == [0.0, 0.1, 0.05, 0.025]


# -- torch's and timm's schedules and averages ------------------------------------------------------------------------

SCHEDULERS = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
}


def test_the_table_lists_every_scheduler_of_torch():
    classes = {**vars(lr_scheduler), "SWALR": swa_utils.SWALR}
    found = {name for name, cls in classes.items() if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler)}
    assert found - {"LRScheduler", "_LRScheduler"} == {*SCHEDULERS, "ReduceLROnPlateau"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_is_stepped_per_optimizer_step(name):
    trainer = trainer_of(sgd_model := linear(), optimizer := sgd(sgd_model), accumulation_steps=2)
    LRScheduling(SCHEDULERS[name](optimizer)).attach(trainer)
    twin = sgd(linear())
    scheduler, expected = SCHEDULERS[name](twin), []
    for _ in range(8):
        expected.append(twin.param_groups[0]["lr"])
        twin.step()
        scheduler.step()
    assert rates(trainer, max_epochs=2) == expected


def test_reduce_on_plateau_is_stepped_with_a_metric():
    trainer = trainer_of(model := linear(), optimizer := sgd(model))
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    LRScheduling(plateau, metric="val/score").attach(trainer)
    Evaluation(scripted([1.0, 2.0, 0.5, 2.0]), [0]).attach(trainer)
    trainer.run(batches(2), max_epochs=4)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5 * 0.5


def test_torchs_averaged_model_and_update_bn():
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    trainer, seen = trainer_of(model), []
    average = swa_utils.AveragedModel(model)
    trainer.add_event_handler(STEP(after=1), lambda: average.update_parameters(model))
    trainer.add_event_handler(STEP(after=1), lambda: seen.append([p.detach().clone() for p in model.parameters()]))
    trainer.run(batches(4))
    swa_utils.update_bn(batches(4), average)
    expected = [torch.stack(same_parameter).mean(0) for same_parameter in zip(*seen, strict=True)]
    assert len(seen) == 3
    torch.testing.assert_close([p.detach() for p in average.parameters()], expected)
    inputs = torch.cat([average.module[0](x) for x, _ in batches(4)]).detach()
    torch.testing.assert_close(average.module[1].running_mean, inputs.mean(0))


def test_an_averaged_model_can_be_evaluated():
    trainer = trainer_of(model := nn.Linear(3, 2))
    average = swa_utils.AveragedModel(model)
    trainer.add_event_handler(STEP, lambda: average.update_parameters(model))
    data = [(x, y.argmax(1)) for x, y in batches(2)]
    Evaluation(create_evaluator(average, {"accuracy": Accuracy()}), data, prefix="average").attach(trainer)
    trainer.run(batches(3))
    guesses = torch.cat([average(x).argmax(1) == y for x, y in data])
    assert trainer.state.metrics["average/accuracy"] == guesses.double().mean().item()


def test_a_schedule_of_timm_counts_optimizer_steps():
    scheduler = pytest.importorskip("timm.scheduler", exc_type=ImportError).CosineLRScheduler
    trainer = trainer_of(model := linear(), optimizer := sgd(model), accumulation_steps=2)
    schedule = scheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=0.01, t_in_epochs=False)
    trainer.add_event_handler(STEP, lambda engine: schedule.step_update(engine.state.optimizer_step))
    cosine = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(2, 8)]
    assert rates(trainer, max_epochs=2) == pytest.approx([0.01, 0.055, *cosine])


def test_timms_average_is_updated_per_optimizer_step():
    average_of = pytest.importorskip("timm.utils", exc_type=ImportError).ModelEmaV3
    trainer, seen = trainer_of(model := linear(), accumulation_steps=2), []
    average, expected = average_of(model, decay=0.5), weights(model)
    trainer.add_event_handler(STEP, lambda: average.update(model))
    trainer.add_event_handler(STEP, lambda: seen.append(weights(model)))
    trainer.run(batches(5))
    for after in seen:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, after, strict=True)]
    assert len(seen) == 3
    torch.testing.assert_close(weights(average.module), expected)
