"""The event files, read with TensorBoard's own reader."""

import pytest
import torch
from event_files import by_hand, curve, read
from ignite.engine import Events
from ignite.metrics import Loss
from tensorboard.plugins.hparams import plugin_data_pb2
from toys import batches, linear, model_of, scripted, sgd, trainer_of

from camshaft import (
    EarlyStopping,
    Evaluation,
    GradientClipping,
    LRScheduling,
    StepEvents,
    TensorBoard,
    create_evaluator,
    create_trainer,
)

MSE = torch.nn.functional.mse_loss


def test_the_loss_is_the_mean_since_the_last_point(tmp_path):
    trainer = trainer_of()
    TensorBoard(tmp_path, every=2).attach(trainer)
    trainer.run(batches(3), max_epochs=2)
    losses, _ = by_hand(batches(3) * 2)
    expected = [(step, (losses[step - 2] + losses[step - 1]) / 2) for step in (2, 4, 6)]
    assert curve(tmp_path, "train/loss") == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_with_accumulation_the_loss_is_not_divided_and_the_axis_is_the_optimizer_step(tmp_path):
    trainer = trainer_of(accumulation_steps=2)
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(batches(4))
    model = linear()
    first = [float(MSE(model(x), y).detach()) for x, y in batches(4)[:2]]
    points = curve(tmp_path, "train/loss")
    assert [step for step, _ in points] == [1, 2]
    assert points[0][1] == pytest.approx(sum(first) / 2, rel=1e-6)


def test_the_rate_is_the_one_that_the_step_used_and_the_norm_is_the_latest(tmp_path):
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    GradientClipping().attach(trainer)
    norms = []
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda e: norms.append(float(e.state.grad_norm)))
    TensorBoard(tmp_path, every=2).attach(trainer)
    trainer.run(batches(4))
    assert curve(tmp_path, "train/lr") == [(2, pytest.approx(0.05)), (4, pytest.approx(0.0125))]
    assert curve(tmp_path, "train/grad_norm") == [(2, pytest.approx(norms[1])), (4, pytest.approx(norms[3]))]


def test_the_norm_equals_the_hand_written_one(tmp_path):
    trainer = trainer_of(clip_grad_norm=100.0)
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(batches(3))
    _, norms = by_hand(batches(3))
    assert [value for _, value in curve(tmp_path, "train/grad_norm")] == pytest.approx(norms, rel=1e-5)


def test_without_clipping_there_is_no_norm(tmp_path):
    trainer = trainer_of()
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(batches(2))
    assert read(tmp_path).Tags()["scalars"] == ["train/loss", "train/lr", "train/samples_per_second"]


def test_samples_per_second_is_samples_divided_by_training_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("camshaft.handlers.tensorboard.time.perf_counter", lambda: now[0])
    trainer = trainer_of()
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: now.append(now.pop() + 0.25))
    TensorBoard(tmp_path, every=3).attach(trainer)
    trainer.run(batches(3, size=4))
    ((step, rate),) = curve(tmp_path, "train/samples_per_second")
    assert step == 3
    assert rate == pytest.approx(12 / 0.75)


def test_the_points_of_a_second_are_fetched_and_written_together(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("camshaft.handlers.tensorboard.time.perf_counter", lambda: now[0])
    trainer = trainer_of()
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: now.append(now.pop() + 0.25))
    board = TensorBoard(tmp_path, every=1).attach(trainer)
    held = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: held.append(len(board._points)))
    trainer.run(batches(6))
    assert held == [1, 2, 3, 0, 1, 2]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_buffered_points_are_written_before_an_exception_propagates(tmp_path):
    trainer = trainer_of()
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.add_event_handler(StepEvents.FORWARD_STARTED(once=4), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run(batches(6))
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2, 3]


def test_each_parameter_group_has_a_curve(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD([{"params": [model.weight], "name": "body"}, {"params": [model.bias], "lr": 1.0}], lr=0.1)
    trainer = trainer_of(model, optimizer)
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(batches(1))
    assert curve(tmp_path, "train/lr/body") == [(1, pytest.approx(0.1))]
    assert curve(tmp_path, "train/lr/1") == [(1, 1.0)]


def test_each_named_loss_has_a_curve(tmp_path):
    model = linear()

    def compute_loss(model, batch):
        fit = MSE(model(batch[0]), batch[1])
        size = model.weight.square().sum()
        return {"loss": fit + size, "fit": fit, "size": size}

    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss)
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(batches(2))
    total, fit, size = (curve(tmp_path, f"train/{name}") for name in ("loss", "fit", "size"))
    assert [value for _, value in total] == pytest.approx([a + b for (_, a), (_, b) in zip(fit, size, strict=True)], rel=1e-6)
    assert fit[0][1] == pytest.approx(by_hand(batches(1))[0][0], rel=1e-6)


def test_metrics_are_written_under_their_names_at_the_step_of_their_evaluation(tmp_path):
    trainer = trainer_of()
    evaluator = create_evaluator(model_of(trainer), metrics={"loss": Loss(MSE)})
    Evaluation(evaluator, batches(2)).attach(trainer)
    seen = []
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: seen.append((e.state.optimizer_step, e.state.metrics["val/loss"]))
    )
    TensorBoard(tmp_path).attach(trainer)
    trainer.run(batches(3), max_epochs=2)
    assert curve(tmp_path, "val/loss") == [(step, pytest.approx(value, rel=1e-6)) for step, value in seen]


def test_metrics_inside_an_epoch_and_at_the_end_are_written_once_each(tmp_path):
    trainer = trainer_of()
    Evaluation(scripted([1.0, 2.0, 3.0]), [0], every=Events.ITERATION_COMPLETED(every=2)).attach(trainer)
    TensorBoard(tmp_path).attach(trainer)
    trainer.run(batches(5))
    assert curve(tmp_path, "val/score") == [(2, 1.0), (4, 2.0), (5, 3.0)]


def test_vectors_and_mappings_are_written_entry_by_entry(tmp_path):
    trainer = trainer_of()
    metrics = {"vector": torch.tensor([1.0, 2.0]), "nested": {"a": 3.0}, "scalar": torch.tensor(4.0)}
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(metrics))
    TensorBoard(tmp_path).attach(trainer)
    trainer.run(batches(2))
    for tag, value in {"vector/0": 1.0, "vector/1": 2.0, "nested/a": 3.0, "scalar": 4.0}.items():
        assert curve(tmp_path, tag) == [(2, value)]


def test_a_metric_that_is_not_a_number_gives_a_warning(tmp_path):
    trainer = trainer_of()
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(odd="text"))
    TensorBoard(tmp_path).attach(trainer)
    with pytest.warns(UserWarning, match="TensorBoard: the metric 'odd' is a str, not a number"):
        trainer.run(batches(2))


def hparams_of(folder):
    """The hyperparameters of a run, as the HParams tab reads them."""
    metadata = read(folder).SummaryMetadata("_hparams_/session_start_info")
    content = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    return dict(content.session_start_info.hparams.items())


def test_hyperparameters_are_written_with_the_final_metrics(tmp_path):
    trainer = trainer_of()
    Evaluation(scripted([1.0, 2.0]), [0]).attach(trainer)
    TensorBoard(tmp_path, hparams={"lr": 0.1, "optimizer": "sgd", "nesterov": False, "layers": 3}).attach(trainer)
    trainer.run(batches(2), max_epochs=2)
    found = hparams_of(tmp_path)
    assert found["lr"].number_value == 0.1
    assert found["optimizer"].string_value == "sgd"
    assert found["nesterov"].bool_value is False
    assert found["layers"].number_value == 3
    metadata = read(tmp_path).SummaryMetadata("_hparams_/experiment")
    experiment = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["val/score"]
    assert curve(tmp_path, "val/score")[-1] == (4, 2.0)


def test_images_are_written_with_the_metrics(tmp_path):
    trainer = trainer_of()
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    images = lambda engine: {"one": torch.rand(3, 4, 5), "grid": torch.rand(2, 1, 4, 5)}  # noqa: E731
    TensorBoard(tmp_path, images=images).attach(trainer)
    trainer.run(batches(2), max_epochs=2)
    reader = read(tmp_path)
    assert [(image.step, image.height, image.width) for image in reader.Images("one")] == [(2, 4, 5), (4, 4, 5)]
    assert [image.step for image in reader.Images("grid")] == [2, 4]


def test_histograms_of_weights_and_gradients_are_written(tmp_path):
    trainer = trainer_of()
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    TensorBoard(tmp_path, histograms=True).attach(trainer)
    trainer.run(batches(2))
    reader = read(tmp_path)
    assert sorted(reader.Tags()["histograms"]) == ["gradients/bias", "gradients/weight", "weights/bias", "weights/weight"]
    (event,) = reader.Histograms("weights/weight")
    assert event.histogram_value.max == pytest.approx(float(model_of(trainer).weight.detach().max()), rel=1e-6)


def test_a_run_that_stops_early_writes_its_last_metrics_and_hyperparameters(tmp_path):
    trainer = trainer_of()
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    EarlyStopping("val/score", patience=1).attach(trainer)
    TensorBoard(tmp_path, every=1, hparams={"lr": 0.1}).attach(trainer)
    trainer.run(batches(2), max_epochs=9)
    assert curve(tmp_path, "val/score") == [(2, 1.0), (4, 1.0)]
    assert hparams_of(tmp_path)["lr"].number_value == 0.1


def test_after_an_exception_all_points_are_on_disk(tmp_path):
    trainer = trainer_of()
    board = TensorBoard(tmp_path, every=1).attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        trainer.run(batches(3))
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2]
    board.detach()


def test_a_skipped_step_makes_no_point(tmp_path):
    trainer = trainer_of()
    TensorBoard(tmp_path, every=1).attach(trainer)
    second = StepEvents.GRADIENTS_READY(lambda engine, _: engine.state.iteration == 2)
    trainer.add_event_handler(second, lambda e: e.skip_step_if(torch.tensor(True)))
    trainer.run(batches(3))
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2]


def test_the_cycle_is_written_as_text(tmp_path):
    trainer = trainer_of(clip_grad_norm=1.0)
    TensorBoard(tmp_path).attach(trainer)
    trainer.run(batches(1))
    reader = read(tmp_path)
    text = reader.Tensors("cycle/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "GradientClipping(max_norm=1.0).clip" in text


def test_many_batches_between_points_have_the_right_mean(tmp_path):
    trainer = trainer_of(optimizer=None, accumulation_steps=600)
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(batches(600, size=1))
    model = linear()
    losses = [float(MSE(model(x), y).detach()) for x, y in batches(600, size=1)]
    assert curve(tmp_path, "train/loss") == [(1, pytest.approx(sum(losses) / 600, rel=1e-5))]


def test_the_rate_of_a_plateau_scheduler_is_the_one_that_the_step_used(tmp_path):
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    LRScheduling(plateau, metric="val/score").attach(trainer)
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    TensorBoard(tmp_path, every=2).attach(trainer)
    trainer.run(batches(2), max_epochs=3)
    assert curve(tmp_path, "train/lr") == [(2, pytest.approx(0.1)), (4, pytest.approx(0.1)), (6, pytest.approx(0.01))]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"every": 0}, ValueError, "every must be a positive integer, got 0"),
        ({"every": 1.5}, ValueError, "every must be a positive integer"),
        ({"images": 3}, TypeError, "images must be a function of the engine, got 3"),
        ({"hparams": {"a": [1]}}, TypeError, r"hparams\['a'\] must be a number, text or bool, got list"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, text, tmp_path):
    with pytest.raises(error, match=text):
        TensorBoard(tmp_path, **arguments)
