"""Evaluation, metrics and averaged weights on several ranks."""

import pytest


@pytest.mark.parametrize("world_size", [2, 3])
def test_metrics_are_the_same_as_in_one_process(results, world_size):
    results.check_same_as_one_process("metrics_over_all_ranks", world_size)


def test_a_sharded_model_can_be_evaluated_before_its_first_step(results):
    assert results("evaluation_before_the_first_step") == [0.0, 0.0]


def test_evaluation_of_a_sharded_model_ends_when_one_rank_has_no_more_batches(results):
    for counts, error in results("evaluation_of_data_of_unknown_length"):
        assert counts == [2, 4]
        assert "they have [2, 3] batches to evaluate" in error


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_averages_of_a_sharded_model_equal_those_under_ddp_and_are_resumed(results, kind):
    for result in results("averages_of_a_sharded_model"):
        assert result["averages from weights"] > 1e-3
        assert result[kind]["averages"] < 1e-12
        assert result[kind]["weights"] < 1e-12  # the model gets its own weights back after each evaluation
        assert result[kind]["loss"] < 1e-6


def test_averages_of_a_sharded_model_cannot_be_copied_into_a_module(results):
    for result in results("averages_of_a_sharded_model"):
        assert result["module"].startswith("RuntimeError: a model under fully_shard can't be copied")
