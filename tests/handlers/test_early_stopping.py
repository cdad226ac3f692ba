"""Early stopping ends a run exactly when the metric has not improved in ``patience`` evaluations in a row."""

import pytest
from ignite.engine import Engine, Events
from toys import batches, scripted, trainer_of

from camshaft import CheckpointRotation, EarlyStopping, Evaluation

NAN, INF = float("nan"), float("inf")


def epochs_of(scores, every=Events.EPOCH_COMPLETED, max_epochs=20, **options):
    """The number of epochs of a run with these scores, of which the last is repeated, and the handler."""
    trainer = trainer_of()
    stopping = EarlyStopping("val/score", **options).attach(trainer)
    Evaluation(scripted(scores), [0], every=every).attach(trainer)
    trainer.run(batches(1), max_epochs=max_epochs)
    return trainer.state.epoch, stopping


@pytest.mark.parametrize(
    ("scores", "options", "epoch"),
    [
        ([1.0], {"patience": 1}, 2),
        ([1.0], {"patience": 3}, 4),
        ([1, 2, 3, 3], {"patience": 2}, 5),
        ([3, 1, 2, 3.5, 3.5], {"patience": 3}, 7),
        ([3, 2, 1, 1], {"patience": 2, "mode": "min"}, 5),
        ([1.0, 1.05, 1.1, 1.1], {"patience": 2, "min_delta": 0.2}, 3),
        ([1.0, 1.15, 1.3, 1.3], {"patience": 2, "min_delta": 0.2}, 5),
        ([5.0, 4.95, 4.9], {"patience": 2, "mode": "min", "min_delta": 0.2}, 3),
        ([-3.0, -2.0, -2.5], {"patience": 2}, 4),
        ([NAN], {"patience": 3}, 3),
        ([1.0, NAN, 2.0, 2.0], {"patience": 2}, 5),
        ([1.0, NAN, NAN], {"patience": 2}, 3),
        ([1.0, INF, INF], {"patience": 2}, 3),
        ([1.0, -INF, -INF], {"patience": 2, "mode": "min"}, 3),
    ],
)
def test_it_stops_at_the_right_epoch(scores, options, epoch):
    assert epochs_of(scores, **options)[0] == epoch


def test_a_score_that_is_not_finite_is_no_improvement():
    _, stopping = epochs_of([NAN, 1.0, INF, 0.5], patience=3)
    assert stopping.best == 1.0


def test_the_reason_names_the_metric_and_the_patience():
    trainer = trainer_of()
    EarlyStopping("val/score", patience=2).attach(trainer)
    Evaluation(scripted([0.75]), [0]).attach(trainer)
    trainer.run(batches(1), max_epochs=9)
    assert trainer.state.stop_reason == "early stopping: val/score hasn't improved in 2 evaluations (the best is 0.75)"


def test_patience_counts_evaluations_and_not_epochs():
    assert epochs_of([1.0], every=Events.EPOCH_COMPLETED(every=3), patience=2)[0] == 9


def test_an_evaluation_inside_an_epoch_is_counted_once_when_it_happens():
    trainer = trainer_of()
    EarlyStopping("val/score", patience=2).attach(trainer)
    Evaluation(scripted([1.0]), [0], every=Events.ITERATION_COMPLETED(every=2)).attach(trainer)
    trainer.run(batches(5), max_epochs=9)
    assert trainer.state.iteration == 6


@pytest.mark.parametrize("saved_after", [2, 3])
def test_best_and_patience_survive_a_resume(saved_after, tmp_path):
    scores = [3.0, 1.0, 2.0, 2.5, 2.9]

    def prepared(scores):
        trainer = trainer_of()
        stopping = EarlyStopping("val/score", patience=4).attach(trainer)
        Evaluation(scripted(scores), [0]).attach(trainer)
        return trainer, stopping, CheckpointRotation(tmp_path).attach(trainer)

    trainer, _, _ = prepared(scores)
    trainer.run(batches(2), max_epochs=saved_after)
    fresh, stopping, checkpoints = prepared(scores[saved_after:])
    checkpoints.resume()
    assert (stopping.best, stopping.stale) == (3.0, saved_after - 1)
    fresh.run(batches(2), max_epochs=20)
    assert fresh.state.epoch == 5


def test_a_new_run_starts_with_full_patience():
    trainer = trainer_of()
    EarlyStopping("val/score", patience=2).attach(trainer)
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    trainer.run(batches(1), max_epochs=9)
    assert trainer.state.epoch == 3
    trainer.state.max_epochs = None
    trainer.run(batches(1), max_epochs=9)
    assert trainer.state.epoch == 3


def test_it_works_on_a_plain_ignite_engine():
    engine = Engine(lambda engine, batch: None)
    EarlyStopping("score", patience=2).attach(engine)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda e: e.state.metrics.__setitem__("score", 1.0))
    engine.run([0], max_epochs=9)
    assert engine.state.epoch == 3


def test_a_metric_that_never_appears_is_an_error():
    trainer = trainer_of()
    EarlyStopping("val/acc").attach(trainer)
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    with pytest.raises(ValueError, match="EarlyStopping: no metric named 'val/acc'.*'val/score'"):
        trainer.run(batches(1), max_epochs=3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"metric": ""}, TypeError, "metric must be a name such as 'val/accuracy', got ''"),
        ({"metric": 3}, TypeError, "metric must be a name"),
        ({"metric": "a", "mode": "up"}, ValueError, "mode must be 'min' or 'max', got 'up'"),
        ({"metric": "a", "patience": 0}, ValueError, "patience must be a positive integer, got 0"),
        ({"metric": "a", "patience": 1.0}, ValueError, "patience must be a positive integer, got 1.0"),
        ({"metric": "a", "min_delta": -0.1}, ValueError, "min_delta must be a finite number of at least 0, got -0.1"),
        ({"metric": "a", "min_delta": NAN}, ValueError, "min_delta must be a finite number"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, text):
    metric = arguments.pop("metric")
    with pytest.raises(error, match=text):
        EarlyStopping(metric, **arguments)


def test_metrics_that_are_replaced_in_each_epoch_are_counted():
    trainer = trainer_of()
    EarlyStopping("score", patience=2).attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def score(engine):
        engine.state.metrics = {"score": 1.0}

    trainer.run(batches(1), max_epochs=9)
    assert trainer.state.epoch == 3


@pytest.mark.parametrize(
    ("metric", "mode", "warned"),
    [("val/loss", "max", True), ("val/loss", "min", False), ("val_rmse", "max", True), ("val/glossary", "max", False)],
)
@pytest.mark.parametrize("make", [EarlyStopping, lambda metric, mode: CheckpointRotation("x", metric=metric, mode=mode)])
def test_a_mode_that_would_keep_the_highest_loss_gives_a_warning(caplog, make, metric, mode, warned):
    make(metric, mode=mode)
    assert (f"the highest '{metric}' counts as the best" in caplog.text) is warned
