"""Training under FSDP2: the same weights as one process on the same global batches."""

import pytest


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "scenario",
    [
        "sharded_accumulation",
        "sharded_losses_weighted_by_samples",
        "sharded_training_with_max_iters",
        "parameters_outside_the_shards",
    ],
)
def test_a_sharded_model_gets_the_same_weights_as_in_one_process(results, scenario, world_size):
    results.check_same_as_one_process(scenario, world_size)
