"""Autocast for forward pass and loss, a gradient scaler for float16, and detaching."""

import pytest
import torch
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

from camshaft import MixedPrecision, StepEvents, create_trainer

MSE = torch.nn.functional.mse_loss


def by_hand(dtype, data):
    model = linear()
    optimizer = sgd(model)
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = MSE(model(x), y)
        loss.backward()
        optimizer.step()
    return model


def test_bf16_equals_a_loop_with_autocast():
    trainer = trainer_of()
    MixedPrecision("bf16").attach(trainer)
    trainer.run(batches(3))
    assert same(weights(model_of(trainer)), weights(by_hand(torch.bfloat16, batches(3))))


def test_fp16_equals_a_loop_with_autocast_and_scaler():
    trainer = trainer_of(amp="fp16")
    trainer.run(batches(3))
    model = linear()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    for x, y in batches(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = MSE(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert same(weights(model_of(trainer)), weights(model))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_name_and_its_dtype_are_equivalent(name, dtype):
    assert MixedPrecision(name).dtype is MixedPrecision(dtype).dtype is dtype


def test_forward_and_loss_run_under_autocast_and_backward_does_not():
    trainer, seen = trainer_of(), {}
    MixedPrecision("bf16").attach(trainer)

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            seen["forward"] = torch.is_autocast_enabled("cpu")
            return loss

        @staticmethod
        def backward(ctx, grad):
            seen["backward"] = torch.is_autocast_enabled("cpu")
            return grad

    model = model_of(trainer)
    spied = create_trainer(model, sgd(model), lambda y_pred, y: Spy.apply(MSE(y_pred, y)), amp="bf16")
    spied.run(batches(1))
    assert seen == {"forward": True, "backward": False}


def test_gradients_are_unscaled_at_gradients_ready():
    trainer, seen = trainer_of(amp="fp16"), []
    model = model_of(trainer)
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: seen.append(model.weight.grad.clone()))
    twin = linear()
    x, y = batches(1)[0]
    MSE(twin(x), y).backward()
    trainer.run([(x, y)])
    torch.testing.assert_close(seen[0], twin.weight.grad, rtol=2e-2, atol=2e-3)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    trainer = trainer_of(amp="fp16")
    before = weights(model_of(trainer))
    x, y = batches(1)[0]
    trainer.run([(x * 1e4, y * 1e4)])
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (0, 1)
    assert trainer.primary.precision.scaler.get_scale() == 2.0**15
    assert same(weights(model_of(trainer)), before)


def test_only_fp16_has_a_scaler():
    assert trainer_of(amp="bf16").primary.precision.scaler.is_enabled() is False
    assert trainer_of(amp="fp16").primary.precision.scaler.is_enabled()


def test_detaching_restores_full_precision():
    trainer = trainer_of()
    with MixedPrecision("fp16").attached(trainer):
        assert trainer.primary.precision.dtype is not None
    assert (trainer.primary.precision.dtype, trainer.primary.precision.scaler.is_enabled()) == (None, False)
    trainer.run(batches(1))
    assert trainer.state.y_pred.dtype == torch.float32


@pytest.mark.parametrize("amp", ["fp8", "float16", torch.float32, 16, True])
def test_an_unknown_precision_is_an_error(amp):
    with pytest.raises(ValueError, match="amp must be None, 'bf16', 'fp16', torch.bfloat16 or torch.float16, got"):
        MixedPrecision(amp)


def test_a_second_precision_is_an_error():
    trainer = trainer_of(amp="bf16")
    with pytest.raises(ValueError, match="phase 'model' has a precision already; detach that MixedPrecision first"):
        MixedPrecision("fp16").attach(trainer, "second")
    assert trainer.primary.precision.dtype == torch.bfloat16
    assert list(trainer.handlers) == ["MixedPrecision"]
