"""Checkpoints that several ranks write."""

import pytest
import torch


def test_checkpoints_are_written_when_they_are_requested(results):
    for iterations in results("checkpoints_at_the_start_of_each_epoch"):
        assert iterations["epochs"] == [[], [7], [7, 14], [7, 14, 21]]
        assert iterations["iterations"] == [[], [5], [5, 10], [5, 10, 15, 20, 21]]


def test_a_checkpoint_in_the_background_is_complete_when_the_run_ends_on_any_rank(results):
    first, second = results("saved_in_the_background")
    assert first == second
    assert first.endswith("step-00000007.pt")


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("saved_on_an_exception", "would wait for the other processes, which may never come to it"),
        ("saved_inside_a_window_under_fsdp", "FSDP2 has gradients of it that have not been reduced"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_an_error(results, scenario, text):
    for error in results(scenario):
        assert error.startswith("RuntimeError")
        assert text in error


def test_a_checksum_that_fails_on_one_rank_is_an_error_on_every_rank_and_leaves_no_folder(results):
    for result in results("checksums_that_fail_on_one_rank"):
        assert result["error"].startswith("OSError")
        assert "rank 1 could not read what it has written" in result["error"]
        assert result["folders left"] == []


def test_batch_norm_statistics_are_those_of_rank_zero_in_checkpoints_and_evaluation(results):
    first, second = results("batch_norm_statistics")
    assert not torch.equal(first["own"], second["own"])
    for means in (first, second):
        assert torch.equal(means["loaded"], first["own"])
        assert torch.equal(means["evaluated"], first["own"])
