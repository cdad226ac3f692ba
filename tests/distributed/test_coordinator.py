"""What one rank requests, every rank carries out at the same moment; plans that differ between ranks are errors."""

import json
import signal

import pytest
import torch


@pytest.mark.parametrize("world_size", [2, 3])
def test_terminate_on_one_rank_ends_all_ranks_at_the_same_iteration(results, world_size):
    states = results("terminated_by_one_rank", world_size)
    assert [state["iteration"] for state in states] == [5] * world_size
    assert states[-1]["reason"] == "enough"
    assert states[0]["reason"] == f"enough (on rank {world_size - 1})"


@pytest.mark.parametrize("world_size", [2, 3])
def test_terminate_at_started_ends_all_ranks_before_the_first_iteration(results, world_size):
    assert results("terminated_at_the_start_by_one_rank", world_size) == [{"iteration": 0, "epoch": 0}] * world_size


def test_terminate_epoch_on_one_rank_skips_epoch_completed_on_all_ranks_if_it_asks_for_that(results):
    assert results("epoch_ended_without_epoch_completed_by_one_rank") == [{"iteration": 10, "completed": [2]}] * 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_interrupt_on_one_rank_interrupts_all_ranks(results, world_size):
    assert results("interrupted_by_one_rank", world_size) == [{"interrupted at": 3, "iteration": 14}] * world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_early_stopping_on_one_rank_stops_all_ranks(results, world_size):
    assert [state["epoch"] for state in results("early_stopping_on_one_rank", world_size)] == [3] * world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_time_limit_on_one_rank_ends_all_ranks_at_the_end_of_the_window(results, world_size):
    assert results("time_limit_on_one_rank", world_size) == [{"iteration": 4, "steps": 2}] * world_size


def test_sigterm_to_one_rank_ends_all_ranks_at_the_end_of_the_window_with_a_checkpoint(results):
    states = results("signal_to_one_rank")
    assert [(state["code"], state["iteration"], state["steps"]) for state in states] == [(128 + signal.SIGTERM, 6, 2)] * 2
    index = json.loads((results.folder() / "signal" / "checkpoints.json").read_text())
    assert index["checkpoints"][-1]["iteration"] == 6


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all_ranks(results, world_size):
    states = results("step_skipped_by_one_rank", world_size)
    assert [(state["steps"], state["skipped"]) for state in states] == [(6, 1)] * world_size
    assert all(torch.equal(states[0]["0.weight"], state["0.weight"]) for state in states)
    assert states[0]["0.weight"].isfinite().all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_non_finite_guard_raises_on_all_ranks_before_the_weights_change(results, world_size):
    for error in results("guard_that_raises_on_rank_zero", world_size):
        assert error.startswith("FloatingPointError")
        assert "iteration 3" in error
        assert error.endswith("after 2")


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("different_numbers_of_batches", "the number of batches"),
        ("a_handler_on_rank_zero_alone", "the attached handlers"),
    ],
)
def test_plans_that_differ_between_ranks_are_an_error_on_every_rank(results, scenario, text):
    for error in results(scenario):
        assert error.startswith("RuntimeError")
        assert text in error


def test_parameters_can_be_frozen_under_ddp_only_if_it_searches_for_unused_parameters(results):
    for result in results("frozen_parameters_under_ddp"):
        assert result["error"].startswith(
            "ValueError: FreezeParameters: DistributedDataParallel waits for the gradients of 0.weight"
        )
        assert "find_unused_parameters=True" in result["error"]
        assert result["are trained"] == [False, True]


def test_cuda_graphs_on_several_ranks_are_an_error(results):
    for error in results("cuda_graphs_on_several_ranks"):
        assert error.startswith("RuntimeError: capture=True is for one process: ")
