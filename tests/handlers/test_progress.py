"""The progress bar, which reads the loss only when it redraws."""

import io
import sys

import pytest
import torch
from ignite.engine import Engine, Events
from toys import batches, linear, scripted, sgd, trainer_of

from camshaft import CheckpointRotation, Evaluation, Progress, create_trainer
from camshaft.readback import Readback


def drawn(trainer, *, data=3, run=None, **options):
    """All states of the bars that a run draws, in order."""
    text = io.StringIO()
    Progress(file=text, ncols=120, **{"every_seconds": 0} | options).attach(trainer)
    trainer.run(batches(data), **(run or {}))
    return text.getvalue().replace("\n", "\r").split("\r")


def test_each_epoch_has_a_bar_that_counts_to_its_end():
    lines = drawn(trainer_of(), run={"max_epochs": 2})
    for number in (1, 2):
        mine = [line for line in lines if line.startswith(f"epoch {number}/2")]
        assert "3/3" in mine[-1]
        assert any("1/3" in line for line in mine)


def test_it_shows_the_loss_and_the_rate():
    trainer, losses = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output)))
    last = [line for line in drawn(trainer) if "3/3" in line][-1]
    assert f"loss={losses[-1]:.3g}"[:9] in last
    assert "it/s" in last


def test_the_final_bar_shows_the_metrics():
    trainer = trainer_of()
    Evaluation(scripted([0.75]), [0]).attach(trainer)
    lines = [line for line in drawn(trainer) if "3/3" in line]
    assert "val/score=0.75" in lines[-1]


def test_metrics_can_be_left_out():
    trainer = trainer_of()
    Evaluation(scripted([0.75]), [0]).attach(trainer)
    assert not any("val/score" in line for line in drawn(trainer, metrics=False))


def test_named_outputs_are_shown_by_name():
    model = linear()
    trainer = create_trainer(
        model, sgd(model), torch.nn.functional.mse_loss, output_transform=lambda x, y, y_pred, loss: {"fit": loss, "size": 2}
    )
    last = [line for line in drawn(trainer) if "3/3" in line][-1]
    assert "fit=" in last
    assert "size=2" in last


def test_it_reads_the_loss_only_when_it_redraws(monkeypatch):
    now, reads = iter(range(10_000)), []
    monkeypatch.setattr("camshaft.handlers.progress.time.monotonic", lambda: next(now) * 0.25)
    monkeypatch.setattr("camshaft.handlers.progress.Readback", lambda values: reads.append(1) or Readback(values))
    drawn(trainer_of(), data=12, every_seconds=1.0)
    assert len(reads) == 3 + 1


def test_a_bar_for_data_of_unknown_length_has_no_total():
    trainer, text = trainer_of(), io.StringIO()
    Progress(file=text, every_seconds=0).attach(trainer)
    trainer.run(iter(batches(3)))
    assert "3it" in text.getvalue()


def test_an_exception_closes_the_bar():
    trainer = trainer_of()
    progress = Progress(file=io.StringIO(), every_seconds=0).attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        trainer.run(batches(3))
    assert progress.bar is None


@pytest.mark.parametrize("stop", [lambda e: e.terminate(), lambda e: e.terminate_epoch(), lambda e: e.terminate(True)])
def test_a_run_that_ends_early_closes_the_bar(stop):
    trainer = trainer_of()
    progress = Progress(file=io.StringIO(), every_seconds=0).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)
    trainer.run(batches(3))
    assert progress.bar is None


def test_a_resumed_epoch_starts_at_its_position(tmp_path):
    first = trainer_of()
    CheckpointRotation(tmp_path).attach(first)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate())
    first.run(batches(4))
    second = trainer_of()
    CheckpointRotation(tmp_path).attach(second).resume()
    lines = drawn(second, data=4)
    assert not any("1/4" in line for line in lines)
    assert any("4/4" in line for line in lines)


def test_it_works_on_a_plain_ignite_engine():
    engine, text = Engine(lambda engine, batch: 0.5), io.StringIO()
    Progress(file=text, every_seconds=0).attach(engine)
    engine.run(range(3), max_epochs=2)
    assert "epoch 2/2" in text.getvalue()
    assert "loss=0.5" in text.getvalue()


def test_detaching_during_a_run_closes_the_bar():
    trainer = trainer_of()
    progress = Progress(file=io.StringIO(), every_seconds=0).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), progress.detach)
    trainer.run(batches(3))
    assert progress.bar is None


def test_attached_during_a_run_it_starts_with_the_next_iteration():
    trainer, text = trainer_of(), io.StringIO()
    progress = Progress(file=text, every_seconds=0)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda e: progress.attach(e))
    trainer.run(batches(3))
    assert "3/3" in text.getvalue()


def test_disabled_it_draws_nothing(capsys):
    trainer = trainer_of()
    Progress(disable=True).attach(trainer)
    trainer.run(batches(3))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_negative_interval_is_an_error(seconds):
    with pytest.raises(ValueError, match="every_seconds must be a number of at least 0, got"):
        Progress(every_seconds=seconds)


def test_without_tqdm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ModuleNotFoundError, match="needs tqdm: pip install tqdm$"):
        Progress()
