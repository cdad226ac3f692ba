"""The accumulation window: its length, and how each loss is scaled and weighted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from camshaft.engines.window import Window

INFINITE = float("inf")


def window_of(steps, loss_weight="batch", partial="step", left=INFINITE):
    window = Window()
    window.configure(steps, loss_weight, partial)
    window.limit(left)
    return window


def scale_losses(window, losses, data):
    """Adds batches to a window as the step does. Returns the scaled losses."""
    scaled = []
    for loss, batch in zip(losses, data, strict=True):
        weight = window.batch_weight(batch)
        scaled.append(float(window.scale_loss(torch.tensor(loss, dtype=torch.float64), weight)))
        window.count(weight)
    return scaled


def batch_of(size):
    return torch.zeros(size, 2), torch.zeros(size)


@pytest.mark.parametrize(
    ("steps", "partial", "left", "length"),
    [
        (4, "step", INFINITE, 4),
        (4, "step", 9, 4),
        (4, "step", 4, 4),
        (4, "step", 3, 3),
        (4, "step", 1, 1),
        (4, "drop", 3, 4),
        (4, "drop", 4, 4),
        (1, "step", 1, 1),
    ],
)
def test_the_length_of_a_new_window(steps, partial, left, length):
    assert window_of(steps, partial=partial, left=left).length == length


def test_each_loss_of_a_full_window_is_scaled_to_the_mean():
    window = window_of(4)
    assert scale_losses(window, [4.0, 8.0, 2.0, 6.0], [None] * 4) == [1.0, 2.0, 0.5, 1.5]
    assert window.divisor() is None


def test_each_loss_of_a_shorter_window_is_scaled_to_its_mean():
    window = window_of(4, left=2)
    assert scale_losses(window, [4.0, 8.0], [None] * 2) == [2.0, 4.0]
    assert window.divisor() is None


def test_gradients_of_a_window_that_ends_early_are_divided_by_its_missing_part():
    window = window_of(4)
    scaled = scale_losses(window, [4.0, 8.0, 2.0], [None] * 3)
    assert window.divisor() == 0.75
    assert sum(scaled) / window.divisor() == pytest.approx((4 + 8 + 2) / 3, abs=1e-15)


def test_losses_are_weighted_by_the_number_of_samples():
    window = window_of(3, "samples")
    scaled = scale_losses(window, [4.0, 8.0, 2.0], [batch_of(1), batch_of(5), batch_of(2)])
    assert scaled == [4.0, 40.0, 4.0]
    assert (window.weight, window.divisor()) == (8, 8)


def test_losses_are_weighted_by_a_custom_function():
    window = window_of(2, lambda batch: batch["tokens"])
    assert scale_losses(window, [4.0, 8.0], [{"tokens": 3}, {"tokens": 0.5}]) == [12.0, 4.0]
    assert window.divisor() == 3.5


@pytest.mark.parametrize("left", [INFINITE, 2])
def test_a_weighted_window_that_ends_early_needs_no_correction(left):
    window = window_of(4, "samples", left=left)
    scale_losses(window, [4.0, 8.0], [batch_of(1), batch_of(5)])
    assert window.divisor() == 6


def test_the_gradient_of_a_single_weighted_batch_is_unchanged():
    window = window_of(1, "samples")
    (scaled,) = scale_losses(window, [3.0], [batch_of(7)])
    assert scaled / window.divisor() == 3.0


def test_the_loss_of_a_window_of_one_batch_is_not_scaled():
    loss = torch.tensor(3.0)
    assert window_of(1).scale_loss(loss, None) is loss


@dataclass
class Sentences:
    lengths: list
    tokens: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(5, 2), 5),
        (batch_of(3), 3),
        ([batch_of(3), batch_of(4)], 3),
        ({"name": "a", "x": torch.zeros(6)}, 6),
        (Sentences([2, 3], torch.zeros(2, 3)), 2),
        ((torch.tensor(1.0), torch.zeros(4, 1)), 4),  # a scalar has no length
        ((None, {"y": [torch.zeros(8)]}), 8),
    ],
    ids=["tensor", "pair", "nested", "dict", "dataclass", "scalar first", "none first"],
)
def test_the_number_of_samples_is_the_length_of_the_first_tensor(batch, samples):
    assert window_of(2, "samples").batch_weight(batch) == samples


@pytest.mark.parametrize("batch", [None, ("a", "b"), torch.tensor(1.0), {}])
def test_a_batch_without_samples_raises(batch):
    with pytest.raises(TypeError, match="loss_weight='samples' needs a tensor with a length"):
        window_of(2, "samples").batch_weight(batch)


@pytest.mark.parametrize("weight", [3, 2.5, 0, torch.tensor(4), torch.tensor([4.0])])
def test_a_weight_is_converted_to_a_number_on_the_host(weight):
    result = window_of(2, lambda batch: weight).batch_weight(None)
    assert result == float(weight)
    assert isinstance(result, (int, float))


@pytest.mark.parametrize("weight", [-1, INFINITE, float("nan"), None, "3", torch.ones(2), torch.tensor(-1.0)])
def test_an_invalid_weight_raises(weight):
    def tokens(batch):
        return weight

    with pytest.raises(ValueError, match=r"loss_weight \(.*tokens\) must return a finite number of at least 0"):
        window_of(2, tokens).batch_weight(None)


def test_a_window_of_weight_zero_raises():
    window = window_of(2, lambda batch: 0)
    scale_losses(window, [4.0, 8.0], [None, None])
    with pytest.raises(ValueError, match="weighs 0"):
        window.divisor()


def test_an_open_window_keeps_its_settings():
    window = window_of(4)
    scale_losses(window, [4.0], [None])
    window.configure(2, "samples")
    assert (window.length, window.steps, window.settings[0]) == (4, 4, 2)
    assert scale_losses(window, [8.0], [batch_of(3)]) == [2.0]
    window.reset()
    window.limit(INFINITE)
    assert (window.length, window.loss_weight) == (2, "samples")


def test_weights_are_cleared_after_each_window():
    window = window_of(2, "samples")
    scale_losses(window, [4.0, 8.0], [batch_of(1), batch_of(5)])
    window.reset()
    assert (window.batches, window.weight) == (0, 0.0)


def test_the_state_of_an_open_window_is_restored():
    before, after = window_of(4, "samples"), window_of(4, "samples")
    scale_losses(before, [4.0, 8.0], [batch_of(1), batch_of(5)])
    after.load_state_dict(before.state_dict())
    for window in (before, after):
        scale_losses(window, [2.0, 1.0], [batch_of(2), batch_of(3)])
    assert (after.batches, after.divisor()) == (before.batches, before.divisor()) == (4, 11)
