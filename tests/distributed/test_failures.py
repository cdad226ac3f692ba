"""A rank that fails is named by the others, and a later run is not affected."""

import pytest
import torch


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_exception_on_one_rank_is_named_by_the_others(results, world_size):
    states = results("exception_on_rank_one", world_size, alone=True)
    assert states[1]["error"] == "ValueError: this batch is spoiled"
    for rank in set(range(world_size)) - {1}:
        assert "rank 1 failed in epoch 1, iteration 4: ValueError: this batch is spoiled" in states[rank]["error"]


def test_an_error_that_resembles_a_lost_connection_is_attributed_to_its_rank(results):
    first, second = results("error_of_rank_one_that_resembles_a_lost_connection", alone=True)
    assert second == "RuntimeError: the socket of the data server timed out"
    assert "rank 1 failed in epoch 1, iteration 3: RuntimeError: the socket of the data server timed out" in first


def test_a_killed_rank_is_reported_by_the_other(results):
    folder = results.folder(only="rank_one_is_killed")
    error = torch.load(folder / "rank_one_is_killed-0.pt", weights_only=True)["error"]
    assert "another process ended without reporting an error" in error
    assert not (folder / "rank_one_is_killed-1.pt").exists()


def test_a_second_failure_is_not_confused_with_the_first(results):
    first, second = results("two_failures_in_a_row", alone=True)
    assert [first[0], *second] == ["ValueError: first", "ValueError: first", "ValueError: second"]
    assert "rank 1 failed in epoch 1, iteration 1: ValueError: second" in first[1]


def test_a_communication_error_is_raised_unchanged_if_no_other_rank_has_reported_a_failure(results):
    first, second = results("time_out_without_and_with_a_report")
    assert first["is unchanged"]
    assert second["attributed"].startswith("rank 0 failed in epoch 1: RuntimeError: [/gloo/")


def test_a_trainer_whose_run_has_failed_is_freed_at_once(results):
    assert [result["is freed"] for result in results("exception_on_rank_one", alone=True)] == [True, True]


def test_gradients_of_a_window_that_an_exception_ended_do_not_affect_the_next_run(results):
    assert results("run_after_an_exception_inside_a_window") == [{"ddp": 0.0, "fsdp": 0.0}] * 2
