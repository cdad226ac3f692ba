"""The moving average equals that of a hand-written loop."""

import pytest
import torch
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

from camshaft import CheckpointRotation, ExponentialMovingAverage, StepEvents, create_trainer

MSE = torch.nn.functional.mse_loss


def by_hand(data, decay):
    """The average of the weights after each step, which starts with the weights after the first."""
    model = linear()
    optimizer, average = sgd(model), None
    for x, y in data:
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
        now = weights(model)
        average = now if average is None else [decay * a + (1 - decay) * w for a, w in zip(average, now, strict=True)]
    return average


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_equals_the_hand_written_one(decay):
    trainer = trainer_of()
    ema = ExponentialMovingAverage(decay).attach(trainer)
    trainer.run(batches(3), max_epochs=2)
    torch.testing.assert_close(weights(ema.module), by_hand(batches(3) * 2, decay), rtol=1e-6, atol=1e-7)


def test_only_completed_steps_count():
    trainer = trainer_of()
    ema = ExponentialMovingAverage(0.5).attach(trainer)
    second = StepEvents.GRADIENTS_READY(lambda engine, _: engine.state.iteration == 2)
    trainer.add_event_handler(second, lambda e: e.skip_step_if(torch.tensor(True)))
    trainer.run(batches(3))
    data = batches(3)
    torch.testing.assert_close(weights(ema.module), by_hand([data[0], data[2]], 0.5), rtol=1e-6, atol=1e-7)


def test_training_is_unaffected_and_the_average_has_no_gradient():
    trainer, plain = trainer_of(), trainer_of()
    ema = ExponentialMovingAverage(0.5).attach(trainer)
    trainer.run(batches(3))
    plain.run(batches(3))
    assert same(weights(model_of(trainer)), weights(model_of(plain)))
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_buffers_are_copies_and_not_shared():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    trainer = create_trainer(model, sgd(model), MSE)
    ema = ExponentialMovingAverage(0.5).attach(trainer)
    trainer.run(batches(3))
    for average, own in zip(ema.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(average, own)
        assert average.data_ptr() != own.data_ptr()


def test_swapped_in_the_model_has_the_averaged_weights_and_then_its_own():
    trainer = trainer_of()
    ema = ExponentialMovingAverage(0.9).attach(trainer)
    trainer.run(batches(3))
    model = model_of(trainer)
    before = weights(model)
    with ema.swapped_in() as swapped:
        assert swapped is model
        assert same(weights(model), weights(ema.module))
    assert same(weights(model), before)


def test_an_exception_in_the_block_restores_the_weights_of_the_model():
    trainer = trainer_of()
    ema = ExponentialMovingAverage(0.9).attach(trainer)
    trainer.run(batches(3))
    before = weights(model_of(trainer))
    with pytest.raises(KeyError, match="out"), ema.swapped_in():
        raise KeyError("out")
    assert same(weights(model_of(trainer)), before)


def test_it_continues_after_a_resume(tmp_path):
    whole = trainer_of()
    expected = ExponentialMovingAverage(0.9).attach(whole)
    whole.run(batches(3), max_epochs=2)
    first = trainer_of()
    ExponentialMovingAverage(0.9).attach(first)
    CheckpointRotation(tmp_path).attach(first)
    first.run(batches(3), max_epochs=1)
    second = trainer_of()
    ema = ExponentialMovingAverage(0.9).attach(second)
    CheckpointRotation(tmp_path).attach(second).resume()
    second.run(batches(3), max_epochs=2)
    assert same(weights(ema.module), weights(expected.module))


def test_after_detaching_the_average_is_kept():
    trainer = trainer_of()
    with ExponentialMovingAverage(0.9).attached(trainer) as ema:
        trainer.run(batches(2))
    kept = weights(ema.module)
    trainer.run(batches(2))
    assert same(weights(ema.module), kept)


def test_asking_for_the_average_before_attaching_is_an_error():
    with pytest.raises(RuntimeError, match="has no average before it is attached"):
        _ = ExponentialMovingAverage().module


@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.1, "0.9", True, None, float("nan")])
def test_a_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match="decay must be a number between 0 and 1, got"):
        ExponentialMovingAverage(decay)
