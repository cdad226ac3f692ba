"""docs/from-your-loop/evaluation.md: the copied code and its replacements."""

import pytest
import torch
from snippet_pages import copied, instead

EVAL_STAYS = "`model.eval()`, and training goes on without `model.train()`"
EVERY_N = "Evaluate every n iterations: `if step % n == 0: evaluate(model)`"
EVAL_OR_NO_GRAD = "`model.eval()` or `torch.no_grad()`: what is the difference?"
DATA = "`.data` or `.detach()`: which one to use"
PRINT_LOSS = "`print(loss.item())` in each iteration"


def test_eval_mode_persists_in_the_second_epoch():
    assert copied(EVAL_STAYS).modes == ["train"] * 10 + ["eval"] * 10


def test_an_evaluation_restores_training_mode():
    page = instead(EVAL_STAYS)
    assert page.modes == ["train"] * 20
    assert page.state.metrics["val/accuracy"] > 0.5


def test_evaluating_by_hand_changes_the_weights_and_unfreezes_batch_norm():
    page = copied(EVERY_N)
    with_it, without = page.train(True), page.train(False)
    assert not torch.equal(with_it[0].weight, without[0].weight)
    assert (with_it[1].training, without[1].training) == (True, False)


def test_iterating_over_a_loader_draws_random_numbers():
    page = copied(EVERY_N)
    model, _ = page.make_model()
    before = torch.get_rng_state()
    page.accuracy_of(model.eval())
    assert not torch.equal(before, torch.get_rng_state())


def test_an_evaluation_changes_neither_weights_nor_modes():
    page = instead(EVERY_N)
    with_it, without = page.train(True), page.train(False)
    assert torch.equal(with_it[0].weight, without[0].weight)
    assert (with_it[1].training, without[1].training) == (False, False)


def test_eval_builds_a_graph_and_no_grad_updates_batch_norm():
    page = copied(EVAL_OR_NO_GRAD)
    assert page.model.eval()(page.x).requires_grad
    assert int(page.model[1].num_batches_tracked) == 2


def test_an_evaluator_builds_no_graph_and_updates_nothing():
    page = instead(EVAL_OR_NO_GRAD)
    assert not page.evaluator.state.y_pred.requires_grad
    assert page.losses[0] == page.losses[1]
    assert int(page.model[1].num_batches_tracked) == 0


def test_data_hides_an_in_place_change_from_autograd():
    page = copied(DATA)
    weight = torch.ones(3, requires_grad=True)
    output = weight.exp()
    output.data.clamp_(0, 1)
    output.sum().backward()
    assert weight.grad.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        page.output.sum().backward()


def test_a_handler_may_change_tensors_of_the_state_in_place():
    page = instead(DATA)
    assert torch.allclose(page.model.weight.grad, page.truth, atol=1e-7)
    assert page.trainer.state.y_pred.max() == 1


def test_item_synchronizes_in_each_iteration():
    assert copied(PRINT_LOSS).waits.count == 10


def test_a_step_does_not_synchronize():
    page = instead(PRINT_LOSS)
    assert page.waits.count == len(page.losses) == 2
