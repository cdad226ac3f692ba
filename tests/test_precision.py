"""Mixed precision: dtypes, autocast, and the gradient scaler."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from toys import batches, linear, same, sgd, trainer_of, weights

from camshaft import Events, MixedPrecision, StepEvents, create_evaluator
from camshaft.precision import autocast_dtype, precision_for

CPU = torch.device("cpu")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [("bf16", torch.bfloat16), ("fp16", torch.float16), *((dtype, dtype) for dtype in HALVES.values())]


def small_batches(number=4):
    """Small values, which do not overflow in half precision."""
    return [(0.1 * x, 0.1 * y) for x, y in batches(number)]


def collect(trainer, event, what):
    seen = []
    trainer.add_event_handler(event, lambda engine: seen.append(what(engine)))
    return seen


# -- precision_for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "dtype"), NAMES)
def test_each_precision_has_a_dtype(amp, dtype):
    assert autocast_dtype(amp) is dtype


@pytest.mark.parametrize("amp", ["fp8", "FP16", "float16", "", torch.float32, torch.float64, torch.int8, 16, True, ["fp16"]])
def test_full_precision_has_no_dtype_to_cast_to(amp):
    with pytest.raises(ValueError, match="amp must be None, 'bf16', 'fp16', torch.bfloat16 or torch.float16, got"):
        autocast_dtype(amp)


@pytest.mark.parametrize(("amp", "dtype"), NAMES)
def test_each_precision_has_an_autocast(amp, dtype):
    with precision_for(amp, CPU).autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    assert not torch.is_autocast_enabled("cpu")


def test_full_precision_has_no_autocast():
    assert precision_for(None, CPU).dtype is None


@pytest.mark.parametrize("amp", HALVES)
def test_a_device_without_autocast_raises(amp):
    with pytest.raises(RuntimeError, match=f"amp='{amp}': there is no autocast on 'fpga' devices; use amp=None"):
        precision_for(amp, torch.device("fpga"))


@pytest.mark.parametrize("amp", [None, "bf16", torch.bfloat16, "fp16", torch.float16])
def test_only_fp16_has_a_scaler(amp):
    phase = trainer_of(amp=amp).primary
    assert phase.precision.scaler.is_enabled() == (amp in ("fp16", torch.float16))
    assert (phase.precision.dtype is None) == (amp is None)


# -- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "dtype"), NAMES)
def test_the_forward_pass_and_the_loss_run_under_autocast_and_the_backward_pass_does_not(amp, dtype):
    seen = []

    class Recording(nn.Linear):
        def forward(self, x):
            y_pred = super().forward(x)
            y_pred.register_hook(lambda grad: seen.append(("backward", torch.is_autocast_enabled("cpu"), grad.dtype)))
            seen.append(("forward", torch.is_autocast_enabled("cpu"), y_pred.dtype))
            return y_pred

    def loss_fn(y_pred, y):
        seen.append(("loss", torch.is_autocast_enabled("cpu"), y_pred.dtype))
        return mse_loss(y_pred, y)

    trainer_of(Recording(3, 2), loss_fn=loss_fn, amp=amp).run(small_batches(1))
    assert seen == [("forward", True, dtype), ("loss", True, dtype), ("backward", False, dtype)]


@pytest.mark.parametrize("amp", [None, *HALVES])
def test_autocast_computes_the_loss_in_full_precision(amp):
    trainer = trainer_of(amp=amp)
    dtypes = collect(trainer, StepEvents.FORWARD_COMPLETED, lambda e: (e.state.loss.dtype, e.state.y_pred.dtype))
    trainer.run(small_batches(1))
    assert dtypes == [(torch.float32, HALVES.get(amp, torch.float32))]


@pytest.mark.parametrize("event", list(StepEvents)[:-1], ids=lambda event: event.name)
def test_no_event_fires_under_autocast(event):
    trainer = trainer_of(amp="fp16")
    inside = collect(trainer, event, lambda e: torch.is_autocast_enabled("cpu"))
    trainer.run(small_batches(2))
    assert inside == [False, False]


@pytest.mark.parametrize("amp", HALVES)
def test_weights_and_gradients_keep_full_precision(amp):
    model = linear()
    trainer = trainer_of(model, amp=amp)
    dtypes = collect(trainer, StepEvents.GRADIENTS_READY, lambda e: {p.grad.dtype for p in model.parameters()})
    trainer.run(small_batches(1))
    assert dtypes == [{torch.float32}]
    assert model.weight.dtype is torch.float32


def test_gradients_are_unscaled_at_gradients_ready():
    """Compared with a loop written by hand: scaling by a power of two changes no bit of a gradient, unless it overflows."""
    model, expected = linear(), linear()
    trainer = trainer_of(model, amp="fp16")
    grads = collect(trainer, StepEvents.GRADIENTS_READY, lambda e: model.weight.grad.clone())
    trainer.run(small_batches(1))
    with torch.autocast("cpu", torch.float16):
        loss = mse_loss(expected(small_batches(1)[0][0]), small_batches(1)[0][1])
    (loss * 2.0**16).backward()
    assert torch.equal(grads[0], expected.weight.grad / 2.0**16)


def test_small_gradients_survive_fp16():
    """Without the scaler, they would underflow to zero."""
    model, plain = linear(), linear()
    trainer = trainer_of(model, loss_fn=lambda y_pred, y: 1e-9 * mse_loss(y_pred, y), amp="fp16")
    grads = collect(trainer, StepEvents.GRADIENTS_READY, lambda e: model.weight.grad.abs().max())
    trainer.run(batches(1))
    with torch.autocast("cpu", torch.float16):
        loss = 1e-9 * mse_loss(plain(batches(1)[0][0]), batches(1)[0][1])
    loss.backward()
    assert float(plain.weight.grad.abs().max()) == 0
    assert float(grads[0]) > 0


# -- the scaler -------------------------------------------------------------------------------------------------------


def test_the_scale_halves_after_a_skipped_step_and_doubles_after_enough_steps():
    model = linear()
    trainer = trainer_of(model, amp="fp16")
    trainer.primary.precision.scaler.set_growth_interval(3)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=2), lambda: model.weight.grad.fill_(float("inf")))
    scales = collect(trainer, Events.ITERATION_COMPLETED, lambda e: e.primary.precision.scaler.get_scale())
    trainer.run([(0.01 * x, 0.01 * y) for x, y in batches(6)])
    assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15, 2.0**16, 2.0**16]


def test_the_scaler_is_updated_once_per_window():
    trainer = trainer_of(amp="fp16", accumulation_steps=2)
    trainer.run(small_batches(4))
    assert trainer.primary.precision.scaler.state_dict()["_growth_tracker"] == 2


def test_a_dropped_window_does_not_change_the_scaler():
    trainer = trainer_of(amp="fp16", accumulation_steps=3, partial_window="drop")
    trainer.run(small_batches(4), max_epochs=2)
    assert trainer.primary.precision.scaler.state_dict()["_growth_tracker"] == trainer.state.optimizer_step == 2
    assert trainer.primary.precision.scaler.get_scale() == 2.0**16


def test_the_scaler_continues_after_a_handler_skips_a_step():
    model = linear()
    before = weights(model)
    trainer = trainer_of(model, amp="fp16")
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: trainer.skip_step_if(torch.tensor(True)))
    trainer.run(small_batches(3))
    assert (trainer.state.skipped_steps, trainer.primary.precision.scaler.get_scale()) == (3, 2.0**16)
    assert same(weights(model), before)


def test_a_parameter_without_a_gradient_does_not_disturb_the_scaler():
    model = linear()
    model.unused = nn.Parameter(torch.ones(1))
    trainer = trainer_of(model, amp="fp16")
    assert trainer.run(small_batches(2)).optimizer_step == 2
    assert model.unused.item() == 1.0


def test_an_optimizer_without_gradients_is_stepped_with_the_others():
    model = nn.ModuleDict({"used": linear(), "unused": nn.Linear(1, 1)})
    model.forward = model["used"].forward
    trainer = trainer_of(model, [sgd(model["used"]), sgd(model["unused"])], amp="fp16")
    assert trainer.run(small_batches(2)).optimizer_step == 2


# -- attaching and detaching ------------------------------------------------------------------------------------------


def test_detaching_restores_the_precision_and_removes_the_scaler():
    model, expected = linear(), linear()
    trainer = trainer_of(model)
    with MixedPrecision("fp16").attached(trainer):
        assert trainer.primary.precision.scaler.is_enabled()
    assert (trainer.primary.precision.dtype, trainer.primary.precision.scaler.is_enabled()) == (None, False)
    trainer.run(batches())
    trainer_of(expected).run(batches())
    assert same(weights(model), weights(expected))


def test_attaching_two_precisions_raises():
    trainer = trainer_of(amp="bf16")
    with pytest.raises(ValueError, match="phase 'model' has a precision already"):
        MixedPrecision("fp16").attach(trainer, "second")
    assert list(trainer.handlers) == ["MixedPrecision"]
    assert trainer.primary.precision.dtype is not None


@pytest.mark.parametrize(("amp", "dtype"), NAMES)
def test_an_evaluator_supports_mixed_precision(amp, dtype):
    model = linear()
    evaluator = create_evaluator(model, amp=amp)
    evaluator.run(batches(1))
    y_pred, _ = evaluator.state.output
    with torch.autocast("cpu", dtype):
        assert torch.equal(y_pred, model(batches(1)[0][0]))
    assert y_pred.dtype is dtype
