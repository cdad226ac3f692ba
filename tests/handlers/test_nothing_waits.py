"""What a run shows is copied behind the work of the device: no step waits for it, and at the end all of it is there."""

import io

import pytest
import torch
from event_files import by_hand, curve
from slow_copies import SlowCopies
from toys import batches, trainer_of

from camshaft import Events, ExponentialMovingAverage, GradientClipping, LRHistory, Progress, StepEvents, TensorBoard


@pytest.fixture
def copies(monkeypatch):
    return SlowCopies().install(monkeypatch)


def waits_in_steps(trainer, copies):
    """The number of waits at the end of each iteration."""
    seen = []
    trainer.add_event_handler_at(-1000, Events.ITERATION_COMPLETED, lambda: seen.append(copies.waits))
    return seen


def test_curves_are_complete_though_no_step_waits_for_a_point(tmp_path, copies, monkeypatch):
    monkeypatch.setattr("camshaft.handlers.tensorboard.FLUSH_AFTER_SECONDS", 0.0)
    trainer = trainer_of()
    for handler in (TensorBoard(tmp_path, every=1), GradientClipping(10.0), LRHistory(), ExponentialMovingAverage(0.9)):
        handler.attach(trainer)
    seen = waits_in_steps(trainer, copies)
    trainer.run(batches(5))
    assert seen == [0] * 5
    assert copies.started >= 5
    losses, norms = by_hand(batches(5))
    assert curve(tmp_path, "train/loss") == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, start=1)]
    assert curve(tmp_path, "train/grad_norm") == [(step, pytest.approx(norm)) for step, norm in enumerate(norms, start=1)]


def test_points_are_written_when_they_have_arrived(tmp_path, copies, monkeypatch):
    monkeypatch.setattr("camshaft.handlers.tensorboard.FLUSH_AFTER_SECONDS", 0.0)
    trainer = trainer_of()
    board = TensorBoard(tmp_path, every=1).attach(trainer)
    pending = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: pending.append(len(board._readings)))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), copies.arrive)
    trainer.run(batches(5))
    assert pending == [1, 2, 3, 1, 2]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2, 3, 4, 5]


def test_a_checkpoint_has_every_earlier_point_on_the_disk(tmp_path, copies):
    trainer = trainer_of()
    board = TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: board.state_dict() and written.extend(steps()))
    steps = lambda: [step for step, _ in curve(tmp_path, "train/loss")]  # noqa: E731
    written = []
    trainer.run(batches(5))
    assert written == [1, 2, 3]


@pytest.mark.parametrize("ends", ["exception", "terminate"])
def test_a_run_that_ends_early_has_written_what_it_had(tmp_path, copies, ends):
    trainer = trainer_of()
    TensorBoard(tmp_path, every=1).attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def end(engine):
        if ends == "exception":
            raise KeyError("out")
        engine.terminate()

    try:
        trainer.run(batches(5))
    except KeyError:
        assert ends == "exception"
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2, 3]


def test_the_samples_per_second_count_every_sample_once(tmp_path, copies, monkeypatch):
    monkeypatch.setattr("camshaft.handlers.tensorboard.FLUSH_AFTER_SECONDS", 0.0)
    clock = iter(range(10_000))
    monkeypatch.setattr("camshaft.handlers.tensorboard.time.perf_counter", lambda: next(clock))
    trainer = trainer_of()
    board, samples = TensorBoard(tmp_path, every=2).attach(trainer), []
    write = board._write_points
    board._write_points = lambda points, rest, readback: (
        samples.append(rest + sum(point.samples for point in points)),
        write(points, rest, readback),
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), copies.arrive)
    trainer.run(batches(7, size=4))
    assert sum(samples) == 6 * 4  # the last window has no point yet


def test_the_bar_shows_losses_that_have_arrived_and_ends_with_the_last(copies):
    text, losses = io.StringIO(), []
    trainer = trainer_of()
    Progress(file=text, ncols=120, every_seconds=0).attach(trainer)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, lambda e: losses.append(f"loss={float(e.state.loss):.4g}"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), copies.arrive)
    seen = waits_in_steps(trainer, copies)
    trainer.run(batches(5))
    lines = [line for line in text.getvalue().replace("\n", "\r").split("\r") if "/5" in line]
    shown = {count: [line for line in lines if f"{count}/5" in line][-1] for count in range(1, 6)}
    assert seen == [0] * 5
    assert "loss" not in shown[1]
    assert losses[0] in shown[2]  # it has arrived before the second redraw
    assert losses[0] in shown[4]  # and no other has since
    assert losses[-1] in shown[5]


def test_the_average_equals_torchs_bit_for_bit():
    swa = torch.optim.swa_utils
    layers = [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)]
    model = torch.nn.Sequential(*layers).double()
    trainer = trainer_of(model)
    expected = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9))
    average = ExponentialMovingAverage(0.9).attach(trainer)
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda: expected.update_parameters(model))
    trainer.run(batches(5, dtype=torch.float64), max_epochs=2)
    for own, other in zip(average.module.parameters(), expected.module.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_parameter_that_is_replaced_between_epochs_is_averaged():
    trainer = trainer_of()
    average, model = ExponentialMovingAverage(0.5).attach(trainer), trainer.primary.module

    @trainer.on(Events.EPOCH_COMPLETED(once=1))
    def replace(engine):
        model.bias = torch.nn.Parameter(torch.full((2,), 8.0))
        engine.primary.optimizers[0].param_groups[0]["params"] = list(model.parameters())

    expected = []
    by_hand = lambda: expected.append(model.bias.detach().lerp(expected[-1], 0.5) if expected else model.bias.detach().clone())  # noqa: E731
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, by_hand)
    trainer.run(batches(2), max_epochs=2)
    assert model.bias.min() > 4
    torch.testing.assert_close(average.module.bias, expected[-1])
