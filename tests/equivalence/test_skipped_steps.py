"""Steps that the gradient scaler skips, compared with the loops in torch's documentation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LinearLR

from camshaft import Events, StepEvents, create_trainer
from camshaft.handlers import GradientClipping, LRHistory, NonFiniteGuard

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused_adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "fused_sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}
OVERFLOWS = (3, 6, 7)
"""The iterations in which a gradient overflows. The first is not among them: if the scaler skips the first step of a fused SGD,
the loop of torch's documentation continues with uninitialized momentum."""


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def batches(number=10):
    generator = torch.Generator().manual_seed(6)
    return [(torch.randn(3, 4, generator=generator), 0.1 * torch.randn(3, 2, generator=generator)) for _ in range(number)]


def overflow_gradient(module, value=float("inf")):
    next(module.parameters()).grad.view(-1)[0] = value


def schedule(optimizer):
    return LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=10)


def fp16_trainer(model, optimizer, **options):
    return create_trainer(model, optimizer, mse_loss, amp="fp16", **options)


def record_events(trainer, *events):
    """A list that is filled with (event, optimizer_step, skipped_steps)."""
    seen = []
    for event in events:
        at = lambda engine, name=event.name: seen.append((name, engine.state.optimizer_step, engine.state.skipped_steps))  # noqa: E731
        trainer.add_event_handler(event, at)
    return seen


def train_as_documented(kind, data, accumulation=1):
    """The loops "Gradient accumulation" and "Gradient clipping" of torch's AMP examples, with a schedule per step."""
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler, scaler = schedule(optimizer), torch.amp.GradScaler("cpu")
    for iteration, (x, y) in enumerate(data, start=1):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = mse_loss(model(x), y) / accumulation
        scaler.scale(loss).backward()
        if iteration in OVERFLOWS:
            overflow_gradient(model)
        if iteration % accumulation == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() == scale:
                scheduler.step()
            optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), scaler.state_dict()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_trainer_equals_the_documented_loop(kind, accumulation):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = schedule(optimizer)
    trainer = fp16_trainer(model, optimizer, accumulation_steps=accumulation, clip_grad_norm=0.5, scheduler=scheduler)
    trainer.add_event_handler(
        StepEvents.BACKWARD_COMPLETED(lambda _, iteration: iteration in OVERFLOWS), lambda: overflow_gradient(model)
    )
    state = trainer.run(batches())
    found = model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), trainer.primary.precision.scaler.state_dict()
    torch.testing.assert_close(found, train_as_documented(kind, batches(), accumulation), rtol=0.0, atol=0.0)
    skipped = len({(iteration - 1) // accumulation for iteration in OVERFLOWS})
    assert (state.skipped_steps, state.optimizer_step) == (skipped, 10 // accumulation - skipped)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_number_of_a_skipped_step_is_used_again(kind):
    model = network()
    trainer = fp16_trainer(model, OPTIMIZERS[kind](model.parameters()))
    attempts = record_events(trainer, StepEvents.GRADIENTS_READY)
    outcomes = record_events(trainer, StepEvents.OPTIMIZER_STEP_COMPLETED, StepEvents.OPTIMIZER_STEP_SKIPPED)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=[2, 3]), lambda: overflow_gradient(model))
    trainer.run(batches(4))
    assert [step for _, step, _ in attempts] == [1, 2, 2, 2]
    assert outcomes == [
        ("OPTIMIZER_STEP_COMPLETED", 1, 0),
        ("OPTIMIZER_STEP_SKIPPED", 1, 1),
        ("OPTIMIZER_STEP_SKIPPED", 1, 2),
        ("OPTIMIZER_STEP_COMPLETED", 2, 2),
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_skipped_step_changes_no_weights_state_or_schedule(kind):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    trainer = fp16_trainer(model, optimizer, scheduler=schedule(optimizer))
    history = LRHistory().attach(trainer)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(after=2), lambda: overflow_gradient(model))
    trainer.run(batches(2))
    short = network()
    short_optimizer = OPTIMIZERS[kind](short.parameters())
    fp16_trainer(short, short_optimizer, scheduler=schedule(short_optimizer)).run(batches(2))
    trainer.run(batches(2), max_epochs=3)
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (2, 4)
    assert [step for step, _ in history.history["lr"]] == [1, 2]
    found, reference = (model.state_dict(), optimizer.state_dict()), (short.state_dict(), short_optimizer.state_dict())
    torch.testing.assert_close(found, reference, rtol=0.0, atol=0.0)


def test_optimizer_step_skipped_is_counted_by_skipped_steps():
    model = network()
    trainer = fp16_trainer(model, OPTIMIZERS["sgd"](model.parameters()))
    seen = record_events(trainer, StepEvents.OPTIMIZER_STEP_SKIPPED(every=2))
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(before=6), lambda: overflow_gradient(model))
    trainer.run(batches())
    assert seen == [("OPTIMIZER_STEP_SKIPPED", 0, 2), ("OPTIMIZER_STEP_SKIPPED", 0, 4)]


def test_a_skipped_step_fires_neither_started_nor_completed():
    model = network()
    trainer = fp16_trainer(model, OPTIMIZERS["fused_adamw"](model.parameters()))
    seen = record_events(trainer, *list(StepEvents)[4:], Events.ITERATION_COMPLETED)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=1), lambda: overflow_gradient(model))
    trainer.run(batches(1))
    names = ["GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_SKIPPED", "ITERATION_COMPLETED"]
    assert [name for name, _, _ in seen] == names


@pytest.mark.parametrize("kinds", [("sgd", "adam"), ("fused_adamw", "fused_sgd")])
@pytest.mark.parametrize("bad", [0, 2])
def test_an_overflow_in_one_optimizer_skips_all(kinds, bad):
    """Compared with a loop written by hand, in which an infinite gradient in one optimizer skips the step of both."""
    model, expected = network(), network()
    trained = [OPTIMIZERS[kind](part.parameters()) for kind, part in zip(kinds, (model[0], model[2]), strict=True)]
    by_hand = [OPTIMIZERS[kind](part.parameters()) for kind, part in zip(kinds, (expected[0], expected[2]), strict=True)]
    trainer = fp16_trainer(model, trained)
    overflows = [1, 4, 5]
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=overflows), lambda: overflow_gradient(model[bad]))
    trainer.run(batches())
    scaler = torch.amp.GradScaler("cpu")
    for iteration, (x, y) in enumerate(batches(), start=1):
        expected.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = mse_loss(expected(x), y)
        scaler.scale(loss).backward()
        if iteration in overflows:
            overflow_gradient(expected[bad])
        for optimizer in by_hand:
            scaler.unscale_(optimizer)
        if iteration not in overflows:
            for optimizer in by_hand:
                scaler.step(optimizer)
        scaler.update()
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (7, 3)
    found = model.state_dict(), [o.state_dict() for o in trained], trainer.primary.precision.scaler.state_dict()
    reference = expected.state_dict(), [o.state_dict() for o in by_hand], scaler.state_dict()
    torch.testing.assert_close(found, reference, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_first_step_may_be_skipped(kind):
    model, expected = network(), network()
    trainer = fp16_trainer(model, OPTIMIZERS[kind](model.parameters()))
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=1), lambda: overflow_gradient(model))
    trainer.run(batches(4))
    other = fp16_trainer(expected, OPTIMIZERS[kind](expected.parameters()))
    other.run(batches(4)[1:])
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), rtol=0.0, atol=0.0)


def test_a_skipped_step_does_not_advance_the_schedules_of_both_optimizers():
    model = network()
    optimizers = [OPTIMIZERS["sgd"](model[0].parameters()), OPTIMIZERS["adam"](model[2].parameters())]
    schedulers = [schedule(optimizer) for optimizer in optimizers]
    trainer = fp16_trainer(model, optimizers, scheduler=schedulers)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=[1, 2, 6]), lambda: overflow_gradient(model[2]))
    trainer.run(batches())
    assert [scheduler.last_epoch for scheduler in schedulers] == [7, 7]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_clipping_does_not_hide_an_overflow(value):
    model = network()
    trainer = fp16_trainer(model, OPTIMIZERS["sgd"](model.parameters()), clip_grad_value=0.1)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=2), lambda: overflow_gradient(model, value))
    trainer.run(batches(3))
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (2, 1)


def test_a_real_overflow_is_skipped_and_the_scale_recovers():
    model = network()
    trainer = fp16_trainer(model, OPTIMIZERS["adam"](model.parameters()))
    trainer.run([(x, 500 * y) for x, y in batches()], max_epochs=2)
    state, scale = trainer.state, trainer.primary.precision.scaler.get_scale()
    assert state.skipped_steps > 0
    assert state.optimizer_step + state.skipped_steps == 20
    assert scale == 2.0**16 / 2**state.skipped_steps
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_gradients_of_a_skipped_window_are_discarded():
    model = network()
    trainer = fp16_trainer(model, OPTIMIZERS["sgd"](model.parameters()), accumulation_steps=2)
    GradientClipping().attach(trainer)
    norms = []
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda: norms.append(float(trainer.state.grad_norm)))
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=1), lambda: overflow_gradient(model))
    trainer.run(batches(4))
    assert norms[0] == float("inf")
    assert 0 < norms[1] < 100


def test_non_finite_guard_ignores_overflows_that_the_scaler_handles():
    model = network()
    trainer = fp16_trainer(model, OPTIMIZERS["sgd"](model.parameters()))
    NonFiniteGuard("raise").attach(trainer)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=2), lambda: overflow_gradient(model))
    trainer.run(batches(3))
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (2, 1)


def test_a_run_that_skips_every_step_does_not_raise():
    model = network()
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = fp16_trainer(model, OPTIMIZERS["sgd"](model.parameters()))
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, lambda: overflow_gradient(model))
    trainer.run(batches(3))
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (0, 3)
    assert all(torch.equal(found, old) for found, old in zip(model.parameters(), before, strict=True))
