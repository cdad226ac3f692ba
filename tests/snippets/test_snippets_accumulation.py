"""docs/from-your-loop/accumulation-and-clipping.md: the copied loops and their replacements."""

import pytest
import torch
from snippet_pages import copied, instead

ZERO_GRAD = "Gradient accumulation with `optimizer.zero_grad()` at the top of each batch"
EVERY_N = "Gradient accumulation with `if (step + 1) % accumulation_steps == 0`"
UNEVEN = "`loss = loss_fn(...) / accumulation_steps` with batches of different sizes"
TWO_LOSSES = 'Several losses, `retain_graph=True` and "Trying to backward through the graph a second time"'
IN_AUTOCAST = "AMP: `scaler.scale(loss).backward()` inside `autocast()`"
CLIP_SCALED = "AMP: gradient clipping before `scaler.unscale_(optimizer)`"
THREE_WAYS = "Three ways of clipping: `clip_grad_norm_`, `clip_grad_value_`, `register_hook`"


def relative_error(page):
    difference = page.gradient(page.model) - page.truth
    return float(difference.norm() / page.truth.norm())


def test_zero_grad_in_each_batch_keeps_only_a_quarter_of_the_last_gradient():
    page = copied(ZERO_GRAD)
    assert torch.equal(page.used, page.gradient(page.model))
    assert page.used.norm() < 0.5 * page.gradient_of_one_big_batch(128).norm()


def test_a_window_of_four_batches_equals_a_large_batch():
    page = instead(ZERO_GRAD)
    assert page.trainer.state.optimizer_step == 1
    assert page.difference.abs().max() < 1e-6


def test_stepping_only_on_multiples_mixes_epochs_and_loses_the_last_batches():
    page = copied(EVERY_N)
    assert page.windows == [4, 4, 6, 4]
    assert page.gathered == 2


def test_an_epoch_ends_with_a_short_window():
    assert instead(EVERY_N).windows == [4, 4, 2, 4, 4, 2]


def test_the_mean_of_batch_means_is_wrong_for_batches_of_different_sizes():
    assert relative_error(copied(UNEVEN)) > 0.5


def test_weighting_by_samples_equals_a_large_batch():
    assert relative_error(instead(UNEVEN)) < 1e-5


def test_a_second_backward_pass_through_a_graph_raises():
    page = copied(TWO_LOSSES)
    assert len(page.passes) == 2
    loss1, loss2 = page.two_losses(*page.batches[0])
    loss1.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss2.backward()


def test_a_mapping_of_losses_needs_one_backward_pass():
    page = instead(TWO_LOSSES)
    assert len(page.passes) == 1
    assert page.state.loss == pytest.approx(float(page.state.losses["digit"] + page.state.losses["odd"]))


def test_a_backward_pass_inside_autocast_runs_in_half_precision():
    (product,) = copied(IN_AUTOCAST).products
    assert product.dtype is torch.float16
    assert product.max() == float("inf")


def test_the_trainer_runs_the_backward_pass_outside_autocast():
    (product,) = instead(IN_AUTOCAST).products
    assert product.dtype is torch.float32
    assert product.isfinite().all()


def test_clipping_scaled_gradients_leaves_almost_nothing():
    page = copied(CLIP_SCALED)
    assert page.norm > 10_000
    assert page.gradient(page.model).norm() == pytest.approx(0.1 / 2**16, rel=0.01)


def test_the_trainer_clips_unscaled_gradients():
    page = instead(CLIP_SCALED)
    assert 0.1 < page.trainer.state.grad_norm < 1
    assert page.gradient(page.model).norm() == pytest.approx(0.1, rel=0.01)


def test_a_hook_clips_each_batch_and_not_their_sum():
    page = copied(THREE_WAYS)
    assert page.gradient(page.model).abs().max() == pytest.approx(0.04, rel=0.01)


def test_each_type_of_clipping_applies_to_the_window():
    page = instead(THREE_WAYS)
    assert page.largest[0] < 0.1
    assert page.largest[1] == page.largest[2] == pytest.approx(0.01)
