"""docs/from-your-loop/schedules-and-freezing.md: the copied code and its replacements."""

import pytest
import torch
from snippet_pages import copied, instead, printed

PLOT = "Plot the learning rate: stepping the scheduler alone"
PIECEWISE = "Piecewise learning rates: `adjust_learning_rate(optimizer, epoch)`"
FREEZE = "Freeze layers: `requires_grad = False` after the optimizer was made"
FINE_TUNE = "Fine-tuning: train, save, load with `strict=False`, freeze"
BATCH_NORM = "Frozen BatchNorm: `requires_grad = False` and its statistics still change"
COUNT = "Count the parameters of a model: `sum(p.numel() for p in ...)`"


def rates(page):
    return [group["lr"] for group in page.optimizer.param_groups]


def test_stepping_only_a_scheduler_warns_and_changes_the_optimizer():
    page = copied(PLOT)
    assert "before `optimizer.step()`" in str(page.caught[0].message)
    assert rates(page) == [pytest.approx(0, abs=1e-9)]


def test_simulated_learning_rates_equal_those_of_training():
    page = instead(PLOT)
    assert len(page.ahead) == 30
    assert page.history.history["lr"] == page.ahead
    assert page.ahead[0] == (1, 0.1)


def test_setting_one_rate_for_all_groups_loses_their_ratio():
    assert rates(copied(PIECEWISE)) == [pytest.approx(0.01), pytest.approx(0.01)]


def test_a_scheduler_keeps_the_ratio_of_the_groups():
    history = instead(PIECEWISE).history.history
    assert [value for _, value in history["lr/0"]] == pytest.approx([0.001] * 30 + [0.0001] * 10)
    assert [value for _, value in history["lr/1"]] == pytest.approx([0.1] * 30 + [0.01] * 10)


def test_a_zero_gradient_changes_frozen_weights():
    page = copied(FREEZE)
    assert (page.model[0][0].weight - page.before).abs().max() > 0.01


def test_freeze_keeps_the_weights_unchanged():
    page = instead(FREEZE)
    assert torch.equal(page.model[0][0].weight, page.before)
    assert page.trainer.state.optimizer_step == 10


def test_strict_false_may_load_nothing():
    page = copied(FINE_TUNE)
    assert not torch.equal(page.model[0][0].weight, page.weight)


def test_the_encoder_is_frozen_until_its_epoch():
    assert [line.endswith("True") for line in printed(FINE_TUNE, "instead").splitlines()] == [True, True, False]


def test_loading_weights_of_another_model_raises(tmp_path):
    page = instead(FINE_TUNE)
    path = page.save_weights(page.model, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"only the checkpoint has 0\.0\.weight"):
        page.load_weights(page.model[0], path)


def test_train_unfreezes_a_frozen_batch_norm():
    assert int(copied(BATCH_NORM).norm.num_batches_tracked) == 20


def test_the_trainer_keeps_a_frozen_batch_norm_in_eval_mode():
    page = instead(BATCH_NORM)
    assert int(page.norm.num_batches_tracked) == 0
    assert page.trainer.state.optimizer_step == 20


def test_summing_sizes_counts_shared_weights_and_buffers_again():
    model = copied(COUNT).model
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 816 + 800 + 17
    assert len(list(model.parameters())) == 3


def test_count_parameters_counts_each_parameter_once():
    page = instead(COUNT)
    assert page.count_parameters(page.Tied()) == (16, 816)
