"""The history of learning rates: recording, plotting and simulating it."""

import sys

import pytest
import torch
from test_lr_scheduling import SCHEDULERS, by_hand
from torch.optim import lr_scheduler
from toys import batches, linear, model_of, sgd, trainer_of

from camshaft import CheckpointRotation, LRHistory, StepEvents


def test_it_records_the_rate_that_each_step_used():
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer, scheduler=lr_scheduler.ExponentialLR(optimizer, 0.5))
    history = LRHistory().attach(trainer)
    trainer.run(batches(3))
    assert history.history == {"lr": [(1, 0.1), (2, 0.05), (3, 0.025)]}


def test_groups_are_recorded_by_name_or_number():
    model = linear()
    optimizer = torch.optim.SGD([{"params": [model.weight], "name": "body"}, {"params": [model.bias], "lr": 1.0}], lr=0.1)
    history = LRHistory().attach(trainer := trainer_of(model, optimizer))
    trainer.run(batches(1))
    assert history.history == {"lr/body": [(1, 0.1)], "lr/1": [(1, 1.0)]}


def test_a_skipped_step_is_not_recorded():
    trainer = trainer_of()
    history = LRHistory().attach(trainer)
    trainer.add_event_handler(
        StepEvents.GRADIENTS_READY(once=2), lambda e: e.skip_step_if(torch.tensor(e.state.iteration == 2))
    )
    trainer.run(batches(3))
    assert history.history["lr"] == [(1, 0.1), (2, 0.1)]


def test_a_rate_that_the_user_sets_is_recorded():
    trainer = trainer_of()
    history = LRHistory().attach(trainer)

    @trainer.on(StepEvents.OPTIMIZER_STEP_STARTED(once=2))
    def change(engine):
        engine.primary.optimizers[0].param_groups[0]["lr"] = 0.3

    trainer.run(batches(3))
    assert history.history["lr"] == [(1, 0.1), (2, 0.3), (3, 0.3)]


def test_it_survives_a_resume(tmp_path):
    trainer = trainer_of()
    LRHistory().attach(trainer)
    CheckpointRotation(tmp_path).attach(trainer)
    trainer.run(batches(2))
    fresh = trainer_of()
    history = LRHistory().attach(fresh)
    CheckpointRotation(tmp_path).attach(fresh).resume()
    fresh.run(batches(2), max_epochs=2)
    assert history.history["lr"] == [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_simulation_equals_the_rates_of_a_run(name):
    optimizer = sgd(linear())
    scheduler = SCHEDULERS[name](optimizer)
    assert [rate for _, rate in LRHistory.simulate(scheduler, 6)["lr"]] == by_hand(SCHEDULERS[name], [6], True)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_simulation_changes_neither_scheduler_nor_optimizer(name):
    model = linear()
    optimizer = sgd(model, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    before = repr(scheduler.state_dict()), repr(optimizer.state_dict()), model.weight.detach().clone()
    LRHistory.simulate(scheduler, 6)
    assert (repr(scheduler.state_dict()), repr(optimizer.state_dict())) == before[:2]
    assert torch.equal(model.weight, before[2])


def test_a_simulation_continues_from_the_state_of_the_scheduler():
    optimizer = sgd(linear())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert LRHistory.simulate(scheduler, 2) == {"lr": [(1, 0.05), (2, 0.025)]}


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_an_invalid_number_of_steps_is_an_error(steps):
    with pytest.raises(ValueError, match="steps must be a positive integer, got"):
        LRHistory.simulate(lr_scheduler.StepLR(sgd(linear()), 1), steps)


def test_the_plot_shows_each_curve_and_is_saved(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 1.0}], lr=0.1)
    history = LRHistory().attach(trainer := trainer_of(model, optimizer))
    trainer.run(batches(3))
    figure = history.plot(tmp_path / "rates.png")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["lr/0", "lr/1"]
    assert list(lines[1].get_xdata()) == [1, 2, 3]
    assert list(lines[1].get_ydata()) == [1.0, 1.0, 1.0]
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = LRHistory().attach(trainer := trainer_of())
    trainer.run(batches(2))
    assert history.plot() is not None
    assert list(tmp_path.iterdir()) == []
    assert model_of(trainer).weight.requires_grad


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="needs matplotlib: pip install matplotlib$"):
        LRHistory().plot()
