"""Gradients under DDP: the same update as one process on the same global batches, reduced once per optimizer step."""

import pytest
import torch


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "scenario",
    [
        "one_batch_per_step",
        "accumulation_with_a_partial_window",
        "accumulation_that_drops_a_partial_window",
        "losses_weighted_by_samples",
        "losses_weighted_by_a_function",
        "an_epoch_of_unknown_length",
        "an_epoch_ended_by_one_rank",
        "parameters_outside_the_ddp_wrapper",
    ],
)
def test_several_processes_compute_the_same_weights_as_one(results, scenario, world_size):
    results.check_same_as_one_process(scenario, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_reduced_once_per_optimizer_step(results, world_size):
    for result in results("reductions", world_size):
        assert result == {"reductions": 6, "steps": 6}  # windows of four in seven batches, three epochs


def test_gradients_are_reduced_again_after_a_run_that_ended_inside_a_window(results):
    first, second = results("a_plain_backward_pass_after_a_run")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("a_model_that_is_not_wrapped", "2 processes train, but the model of phase 'model' is not wrapped"),
        ("an_objective_that_bypasses_ddp", "their gradients were not reduced"),
        ("a_schedule_that_differs_between_ranks", "the learning rates of phase 'model' differ: [0.01"),
        ("parameters_unfrozen_after_wrapping", "unfreeze what will be trained, before you wrap it"),
    ],
)
def test_a_model_that_cannot_be_synchronized_is_an_error_on_every_rank(results, scenario, text):
    for error in results(scenario):
        assert error.startswith("RuntimeError")
        assert text in error
