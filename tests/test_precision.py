"""Which precisions there are, what they make of forward, loss and gradient, and the scaler's life."""

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
    """Without an overflow in half precision."""
    return [(0.1 * x, 0.1 * y) for x, y in batches(number)]


def collect(trainer, event, what):
    seen = []
    trainer.add_event_handler(event, lambda engine: seen.append(what(engine)))
    return seen


# -- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "dtype"), NAMES)
def test_dtype_of_a_precision(amp, dtype):
    assert autocast_dtype(amp) is dtype


@pytest.mark.parametrize("amp", ["fp8", "FP16", "float16", "", torch.float32, torch.float64, torch.int8, 16, True, ["fp16"]])
def test_no_precision(amp):
    with pytest.raises(ValueError, match="amp must be None, 'bf16', 'fp16', torch.bfloat16 or torch.float16, got"):
        autocast_dtype(amp)


@pytest.mark.parametrize(("amp", "dtype"), NAMES)
def test_autocast_of_a_precision(amp, dtype):
    with precision_for(amp, CPU).autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    assert not torch.is_autocast_enabled("cpu")


def test_no_autocast_in_full_precision():
    assert precision_for(None, CPU).dtype is None


@pytest.mark.parametrize("amp", HALVES)
def test_device_without_autocast(amp):
    with pytest.raises(RuntimeError, match=f"amp='{amp}': there is no autocast on 'fpga' devices; use amp=None"):
        precision_for(amp, torch.device("fpga"))


@pytest.mark.parametrize("amp", [None, "bf16", torch.bfloat16, "fp16", torch.float16])
def test_scaler_exists_for_fp16_only(amp):
    phase = trainer_of(amp=amp).primary
    assert phase.precision.scaler.is_enabled() == (amp in ("fp16", torch.float16))
    assert (phase.precision.dtype is None) == (amp is None)


# -- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "dtype"), NAMES)
def test_forward_and_loss_are_in_autocast_and_backward_is_not(amp, dtype):
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            y_pred = super().forward(x)
            y_pred.register_hook(lambda grad: seen.append(("backward", torch.is_autocast_enabled("cpu"), grad.dtype)))
            seen.append(("forward", torch.is_autocast_enabled("cpu"), y_pred.dtype))
            return y_pred

    def loss_fn(y_pred, y):
        seen.append(("loss", torch.is_autocast_enabled("cpu"), y_pred.dtype))
        return mse_loss(y_pred, y)

    trainer_of(Watched(3, 2), loss_fn=loss_fn, amp=amp).run(small_batches(1))
    assert seen == [("forward", True, dtype), ("loss", True, dtype), ("backward", False, dtype)]


@pytest.mark.parametrize("amp", [None, *HALVES])
def test_loss_is_computed_in_full_precision_where_autocast_says_so(amp):
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
def test_weights_and_gradients_stay_in_full_precision(amp):
    model = linear()
    trainer = trainer_of(model, amp=amp)
    dtypes = collect(trainer, StepEvents.GRADIENTS_READY, lambda e: {p.grad.dtype for p in model.parameters()})
    trainer.run(small_batches(1))
    assert dtypes == [{torch.float32}]
    assert model.weight.dtype is torch.float32


def test_gradients_ready_are_unscaled():
    """By hand: the scaler's power of two changes no bit of a gradient that doesn't overflow."""
    model, expected = linear(), linear()
    trainer = trainer_of(model, amp="fp16")
    grads = collect(trainer, StepEvents.GRADIENTS_READY, lambda e: model.weight.grad.clone())
    trainer.run(small_batches(1))
    with torch.autocast("cpu", torch.float16):
        loss = mse_loss(expected(small_batches(1)[0][0]), small_batches(1)[0][1])
    (loss * 2.0**16).backward()
    assert torch.equal(grads[0], expected.weight.grad / 2.0**16)


def test_small_gradients_survive_fp16():
    """Without the scaler they would be flushed to zero."""
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


def test_scale_halves_when_a_step_is_refused_and_doubles_after_enough_good_ones():
    model = linear()
    trainer = trainer_of(model, amp="fp16")
    trainer.primary.precision.scaler.set_growth_interval(3)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=2), lambda: model.weight.grad.fill_(float("inf")))
    scales = collect(trainer, Events.ITERATION_COMPLETED, lambda e: e.primary.precision.scaler.get_scale())
    trainer.run([(0.01 * x, 0.01 * y) for x, y in batches(6)])
    assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15, 2.0**16, 2.0**16]


def test_scaler_is_updated_once_per_window():
    trainer = trainer_of(amp="fp16", accumulation_steps=2)
    trainer.run(small_batches(4))
    assert trainer.primary.precision.scaler.state_dict()["_growth_tracker"] == 2


def test_dropped_window_leaves_the_scaler_as_it_was():
    trainer = trainer_of(amp="fp16", accumulation_steps=3, partial_window="drop")
    trainer.run(small_batches(4), max_epochs=2)
    assert trainer.primary.precision.scaler.state_dict()["_growth_tracker"] == trainer.state.optimizer_step == 2
    assert trainer.primary.precision.scaler.get_scale() == 2.0**16


def test_step_that_a_handler_refuses_lets_the_scaler_go_on():
    model = linear()
    before = weights(model)
    trainer = trainer_of(model, amp="fp16")
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: trainer.skip_step_if(torch.tensor(True)))
    trainer.run(small_batches(3))
    assert (trainer.state.skipped_steps, trainer.primary.precision.scaler.get_scale()) == (3, 2.0**16)
    assert same(weights(model), before)


def test_parameter_without_a_gradient_is_nothing_to_the_scaler():
    model = linear()
    model.unused = nn.Parameter(torch.ones(1))
    trainer = trainer_of(model, amp="fp16")
    assert trainer.run(small_batches(2)).optimizer_step == 2
    assert model.unused.item() == 1.0


def test_optimizer_without_any_gradient_steps_along():
    model = nn.ModuleDict({"used": linear(), "unused": nn.Linear(1, 1)})
    model.forward = model["used"].forward
    trainer = trainer_of(model, [sgd(model["used"]), sgd(model["unused"])], amp="fp16")
    assert trainer.run(small_batches(2)).optimizer_step == 2


# -- attaching and detaching ------------------------------------------------------------------------------------------


def test_detaching_takes_precision_and_scaler_back():
    model, expected = linear(), linear()
    trainer = trainer_of(model)
    with MixedPrecision("fp16").attached(trainer):
        assert trainer.primary.precision.scaler.is_enabled()
    assert (trainer.primary.precision.dtype, trainer.primary.precision.scaler.is_enabled()) == (None, False)
    trainer.run(batches())
    trainer_of(expected).run(batches())
    assert same(weights(model), weights(expected))


def test_two_precisions_are_an_error():
    trainer = trainer_of(amp="bf16")
    with pytest.raises(ValueError, match="phase 'model' has a precision already"):
        MixedPrecision("fp16").attach(trainer, "second")
    assert list(trainer.handlers) == ["MixedPrecision"]
    assert trainer.primary.precision.dtype is not None


@pytest.mark.parametrize(("amp", "dtype"), NAMES)
def test_evaluator_in_mixed_precision(amp, dtype):
    model = linear()
    evaluator = create_evaluator(model, amp=amp)
    evaluator.run(batches(1))
    y_pred, _ = evaluator.state.output
    with torch.autocast("cpu", dtype):
        assert torch.equal(y_pred, model(batches(1)[0][0]))
    assert y_pred.dtype is dtype
