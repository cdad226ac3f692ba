"""NaN in the data, with and without `NonFiniteGuard`."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss
from toys import batches, linear, names_iteration, same, sgd, trainer_of, weights

from camshaft import (
    Events,
    NonFiniteGuard,
)


def with_nan(at):
    data = batches()
    data[at - 1][0][0, 0] = float("nan")
    return data


def test_a_nan_without_a_guard_gives_the_result_of_a_plain_loop():
    model, expected = linear(), linear()
    losses = []
    trainer = trainer_of(model)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(float(trainer.state.output)))
    trainer.run(with_nan(at=2))
    optimizer = sgd(expected)
    for x, y in with_nan(at=2):
        optimizer.zero_grad()
        mse_loss(expected(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0, equal_nan=True)
    assert [loss == loss for loss in losses] == [True, False, False]
    assert trainer.state.optimizer_step == 3


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
def test_a_nan_with_a_guard_that_raises(amp):
    model, expected = linear(), linear()
    trainer = trainer_of(model, amp=amp)
    NonFiniteGuard().attach(trainer)
    with pytest.raises(FloatingPointError, match="the loss of iteration 2 is nan") as caught:
        trainer.run(with_nan(at=2))
    trainer_of(expected, amp=amp).run(batches(1))
    assert names_iteration(caught, 2)
    assert same(weights(model), weights(expected))


@pytest.mark.parametrize(("action", "step", "skipped"), [("skip", 2, 1), ("stop", 1, 1)])
def test_a_nan_with_a_guard_that_skips_or_stops(action, step, skipped):
    model = linear()
    trainer = trainer_of(model)
    NonFiniteGuard(action).attach(trainer)
    state = trainer.run(with_nan(at=2))
    assert (state.optimizer_step, state.skipped_steps) == (step, skipped)
    assert all(tensor.isfinite().all() for tensor in weights(model))
    assert (state.stop_reason is not None) == (action == "stop")
