"""GANs on several ranks."""

import pytest


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_gan_gets_the_same_weights_as_in_one_process(results, world_size):
    results.check_same_as_one_process("a_gan_with_a_penalty", world_size)


def test_a_penalty_works_with_a_sharded_generator_but_not_with_a_sharded_critic(results):
    for result in results("penalties_of_sharded_networks"):
        for error in (result["in training"], result["called"]):
            assert error.startswith("ValueError: penalty: the critic ")
            assert "Wrap the critic in DistributedDataParallel" in error
        assert result["difference"] < 1e-12
