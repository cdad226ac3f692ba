"""Runs on several ranks that are stopped and resumed."""

import shutil

import pytest
import torch


def test_a_resumed_run_is_exact_between_windows_and_to_rounding_inside(results):
    for differences in results("resumed_after_each_iteration"):
        assert list(differences) == list(range(1, 14))
        between_windows = {stop: difference for stop, difference in differences.items() if stop in (3, 6, 7, 10, 13)}
        assert set(between_windows.values()) == {0}
        assert max(differences.values()) < 1e-14


@pytest.mark.parametrize("scenario", ["resumed_from_sharded_checkpoints", "resumed_from_full_checkpoints_under_fsdp"])
def test_a_run_under_fsdp_is_resumed_exactly(results, scenario):
    for differences in results(scenario):
        assert differences == {3: 0.0, 6: 0.0, 8: 0.0, 10: 0.0}  # an open window is finished before the run stops


def test_a_window_with_gradients_that_differ_between_ranks_is_resumed(results):
    assert results("resumed_with_gradients_that_differ_between_ranks") == [pytest.approx(0, abs=1e-14)] * 2


def test_a_window_under_fsdp_with_reduced_gradients_is_resumed(results):
    for differences in results("resumed_inside_a_window_under_fsdp"):
        assert differences == {False: pytest.approx(0, abs=1e-14), True: pytest.approx(0, abs=1e-14)}


def test_an_epoch_that_ended_because_one_rank_had_no_more_data_is_resumed_at_its_end(results):
    assert results("resumed_after_an_epoch_that_one_rank_ended") == [{5: 0.0, 10: 0.0}] * 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_sharded_checkpoints_load_on_another_number_of_processes(results, tmp_path, world_size):
    (expected, _) = results("first_half_of_a_sharded_run")
    shutil.copytree(results.folder() / "first half", tmp_path / "first half")
    for result in results.run_in(tmp_path, "second_half_of_a_sharded_run", world_size):
        assert all(torch.equal(result[name], expected[name]) for name in expected if name != "step")
        assert result["change"] > 0
        assert result["moments"] > 0
        assert (result["epoch"], result["iteration"], result["steps"]) == (2, 14, 6)
