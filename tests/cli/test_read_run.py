"""What is read of a run is what the run was."""

import json
import math
import re

import pytest
import torch
from ignite.engine import Events
from runs_on_disk import SCORES, flip, train, truncate
from toys import batches, linear, sgd, trainer_of

from camshaft import CheckpointRotation, LRHistory, TensorBoard, create_gan_trainer
from camshaft.cli.run import read_run

RATES = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025, 0.025]
"""Halved after every third step."""


def by_hand(lr_of=lambda step: RATES[step], epochs=3):
    """Each step's loss, by hand."""
    model, losses = linear(), []
    optimizer = sgd(model)
    for step, (x, y) in enumerate(batches(3) * epochs):
        optimizer.param_groups[0]["lr"] = lr_of(step)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(curve):
    return [value for _, value in curve]


def test_the_checkpoints_are_those_that_were_kept(tmp_path):
    rotation = train(tmp_path)
    found = [(one.file, one.optimizer_step, one.epoch, one.iteration, one.score) for one in read_run(tmp_path).checkpoints]
    assert found == [("step-00000006.pt", 6, 2, 6, 0.75), ("step-00000009.pt", 9, 3, 9, 0.5)]
    assert [one.size for one in read_run(tmp_path).checkpoints] == [rotation.best.stat().st_size, rotation.last.stat().st_size]


def test_a_checkpoint_that_was_deleted_by_hand_has_no_size(tmp_path):
    train(tmp_path).best.unlink()
    assert [one.size is None for one in read_run(tmp_path).checkpoints] == [True, False]


def test_the_curves_are_those_of_the_run(tmp_path):
    train(tmp_path)
    metrics = read_run(tmp_path).metrics
    assert metrics["val/score"] == [(3, 0.25), (6, 0.75), (9, 0.5)]
    assert [step for step, _ in metrics["train/loss"]] == list(range(1, 10))
    assert values(metrics["train/loss"]) == pytest.approx(by_hand(), rel=1e-6)
    assert "train/lr" not in metrics


def test_without_event_files_the_metrics_are_those_of_the_checkpoints(tmp_path):
    train(tmp_path, board=False)
    assert read_run(tmp_path).metrics == {"val/score": [(6, 0.75), (9, 0.5)]}


def test_the_learning_rates_are_the_histories_to_the_last_step(tmp_path):
    train(tmp_path, every=4)
    assert read_run(tmp_path).learning_rates == {"lr": list(enumerate(RATES, start=1))}


def test_a_history_of_another_name_is_found(tmp_path):
    trainer = trainer_of()
    LRHistory().attach(trainer, name="rates")
    CheckpointRotation(tmp_path).attach(trainer)
    trainer.run(batches(2))
    assert read_run(tmp_path).learning_rates == {"lr": [(1, 0.1), (2, 0.1)]}


def test_without_a_history_the_learning_rates_are_those_of_the_event_files(tmp_path):
    train(tmp_path, history=False, every=3)
    rates = read_run(tmp_path).learning_rates
    assert rates == {"train/lr": [(3, pytest.approx(0.1)), (6, pytest.approx(0.05)), (9, pytest.approx(0.025))]}


def test_without_both_the_rate_is_the_one_that_the_next_step_would_use(tmp_path):
    train(tmp_path, history=False, board=False)
    assert read_run(tmp_path).learning_rates == {"lr": [(10, 0.0125)]}


def test_several_groups_have_a_rate_each(tmp_path):
    model = linear()
    groups = [{"params": [model.weight], "name": "body", "lr": 0.1}, {"params": [model.bias], "name": "head", "lr": 0.2}]
    trainer = trainer_of(model, torch.optim.SGD(groups))
    CheckpointRotation(tmp_path).attach(trainer)
    trainer.run(batches(2))
    assert read_run(tmp_path).learning_rates == {"lr/body": [(3, 0.1)], "lr/head": [(3, 0.2)]}


# -- why it stopped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", [True, False])
def test_a_run_that_has_reached_its_last_epoch_has_finished(board, tmp_path):
    train(tmp_path, board=board)
    ending = read_run(tmp_path).ending
    assert (ending.reason, ending.ended) == ("finished after 3 epochs", True)


@pytest.mark.parametrize("board", [True, False])
def test_a_run_that_has_reached_its_last_iteration_has_finished(board, tmp_path):
    trainer = trainer_of()
    CheckpointRotation(tmp_path).attach(trainer)
    if board:
        TensorBoard(tmp_path).attach(trainer)
    trainer.run(batches(3), max_iters=4)
    assert read_run(tmp_path).ending.reason == "finished after 4 iterations"


@pytest.mark.parametrize("board", [True, False])
def test_early_stopping_is_the_reason(board, tmp_path):
    train(tmp_path, max_epochs=9, patience=2, board=board)
    reason = "early stopping: val/score hasn't improved in 2 evaluations (the best is 0.75)"
    assert read_run(tmp_path).ending.reason == reason


@pytest.mark.parametrize("board", [True, False])
def test_the_reason_of_terminate_is_the_reason(board, tmp_path):
    train(tmp_path, stop_at=5, board=board)
    assert read_run(tmp_path).ending.reason == "enough"


def test_a_run_that_leaves_out_its_last_event_has_a_reason_too(tmp_path):
    trainer = trainer_of()
    TensorBoard(tmp_path).attach(trainer)
    end = Events.ITERATION_COMPLETED(once=2)
    trainer.add_event_handler(end, lambda: trainer.terminate(skip_completed=True, reason="enough"))
    trainer.run(batches(3))
    assert read_run(tmp_path).ending.reason == "enough"


def test_an_exception_is_the_reason(tmp_path):
    with pytest.raises(ValueError, match="broken"):
        train(tmp_path, fail_at=5)
    ending = read_run(tmp_path).ending
    assert (ending.reason, ending.ended) == ("ValueError: broken", True)


def test_without_event_files_the_reason_of_a_failed_run_is_not_known(tmp_path):
    with pytest.raises(ValueError, match="broken"):
        train(tmp_path, fail_at=5, board=False)
    ending = read_run(tmp_path).ending
    assert re.match("not known: the newest good checkpoint is of epoch 1 of 3;", ending.reason)
    assert not ending.ended


def resumed(folder):
    """A trainer that resumes from the last checkpoint in the folder."""
    trainer = trainer_of()
    board = TensorBoard(folder, every=1).attach(trainer)
    CheckpointRotation(folder / "checkpoints").attach(trainer).resume()
    return trainer, board


def test_a_resumed_run_has_an_end_of_its_own(tmp_path):
    resumed(tmp_path)[0].run(batches(3), max_epochs=2)
    resumed(tmp_path)[0].run(batches(3), max_epochs=4)
    assert read_run(tmp_path).ending.reason == "finished after 4 epochs"


def test_the_end_of_an_earlier_run_is_not_that_of_one_that_still_runs(tmp_path):
    resumed(tmp_path)[0].run(batches(3), max_epochs=2)
    trainer, board = resumed(tmp_path)
    seen = []

    @trainer.on(Events.ITERATION_COMPLETED(lambda engine, iteration: iteration in (7, 11)))
    def look():
        board.writer.flush()
        seen.append(read_run(tmp_path).ending.reason)

    trainer.run(batches(3), max_epochs=4)
    whys = ["checkpoint was written before the latest run began", "checkpoint is of epoch 3 of 4"]
    assert seen == [f"not known: the newest good {why}; it still continues, was killed, or has failed" for why in whys]


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_read(damage, tmp_path):
    damage(train(tmp_path, board=False).last)
    run = read_run(tmp_path)
    assert run.learning_rates == {"lr": list(enumerate(RATES[:6], start=1))}
    assert len(run.warnings) == 1
    assert re.search("step-00000009.pt is damaged", run.warnings[0])


def test_if_every_checkpoint_is_damaged_the_end_is_not_known(tmp_path):
    rotation = train(tmp_path, board=False)
    flip(rotation.last)
    flip(rotation.best)
    run = read_run(tmp_path)
    assert run.ending.reason == "not known: there is no good checkpoint; it still continues, was killed, or has failed"
    assert (run.learning_rates, len(run.warnings)) == ({}, 2)


def test_an_event_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    train(tmp_path)
    truncate(next(tmp_path.glob("events.out.tfevents.*")), left=0.8)
    steps = [step for step, _ in read_run(tmp_path).metrics["train/loss"]]
    assert steps == list(range(1, len(steps) + 1))
    assert 0 < len(steps) < 9


def test_reading_changes_nothing_on_the_disk(tmp_path):
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    read_run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# -- as JSON ----------------------------------------------------------------------------------------------------------


def test_as_json_is_the_same_again(tmp_path):
    train(tmp_path)
    content = json.loads(json.dumps(read_run(tmp_path).as_json()))
    assert content["metrics"]["val/score"] == [[step, score] for step, score in zip((3, 6, 9), SCORES, strict=False)]
    assert content["ending"] == {"reason": "finished after 3 epochs", "ended": True}
    assert [one["file"] for one in content["checkpoints"]] == ["step-00000006.pt", "step-00000009.pt"]


def test_what_is_not_finite_is_null_in_json(tmp_path):
    trainer = trainer_of(loss_fn=lambda y_pred, y: (y_pred - y).mean() * math.nan)
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(batches(1))
    run = read_run(tmp_path)
    assert math.isnan(run.metrics["train/loss"][0].value)
    assert run.as_json()["metrics"]["train/loss"] == [[1, None]]


# -- several networks -------------------------------------------------------------------------------------------------


def gan(folder, **handlers):
    generator, critic = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)
    trainer = create_gan_trainer(generator, critic, sgd(generator, 0.1), sgd(critic, 0.2), latent=4, discriminator_steps=2)
    for handler in handlers.values():
        handler.attach(trainer)
    CheckpointRotation(folder / "checkpoints").attach(trainer)
    trainer.run([torch.randn(4, 3)] * 4)


def test_each_network_has_a_rate_of_its_own(tmp_path):
    gan(tmp_path, history=LRHistory())
    rates = read_run(tmp_path).learning_rates
    assert rates == {"discriminator/lr": [(step, 0.2) for step in (1, 2, 3, 4)], "generator/lr": [(1, 0.1), (2, 0.1)]}


def test_without_a_history_each_network_has_the_rate_of_its_next_step(tmp_path):
    gan(tmp_path)
    assert read_run(tmp_path).learning_rates == {"discriminator/lr": [(5, 0.2)], "generator/lr": [(3, 0.1)]}


def test_the_losses_of_both_networks_are_curves(tmp_path):
    gan(tmp_path, board=TensorBoard(tmp_path, every=1))
    run = read_run(tmp_path)
    assert {"train/discriminator_loss", "train/generator_loss"} <= set(run.metrics)
    assert set(run.learning_rates) == {"train/discriminator/lr", "train/generator/lr"}
