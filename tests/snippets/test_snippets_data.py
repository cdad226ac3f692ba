"""docs/from-your-loop/seeds-and-data.md: the copied code and its replacements."""

import pytest
import torch
from snippet_pages import copied, instead, printed

SEED = "Set the random seed: `np.random(seed)`"
CALLED = "`DataLoader(worker_init_fn=_worker_init_fn_())`"
PRECEDENCE = "`np.random.seed(torch.initial_seed() // 2**32-1)`: every worker draws the same numbers"
DEVICE = '"Expected all tensors to be on the same device": `model.cuda()` and `x.cuda()`'
DATA_PARALLEL = '`nn.DataParallel` and "Missing key(s) in state_dict"'
DICTS = 'Dict batches: `for x, y in loader` and "too many values to unpack"'
LENGTHS = 'A custom `Dataset` and "stack expects each tensor to be equal size"'


def test_calling_a_module_as_a_seed_function_raises():
    page = copied(SEED)
    with pytest.raises(TypeError, match="module"):
        page.set_seed(0)


def test_without_a_seed_numpy_draws_other_numbers():
    first, second = copied(SEED).draws
    assert first != second


def test_seed_everything_seeds_all_generators():
    first, second = instead(SEED).draws
    assert first == second


def test_calling_the_worker_function_passes_none():
    assert copied(CALLED).loader.worker_init_fn is None


def test_calling_the_worker_function_raises_for_a_small_seed():
    page = copied(CALLED)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"between 0 and 2\*\*32 - 1"):
        page._worker_init_fn_()


def test_workers_draw_different_numbers():
    draws = instead(CALLED).draws
    assert draws[0::2] != draws[1::2]


def test_wrong_operator_precedence_gives_workers_the_same_numbers():
    draws = copied(PRECEDENCE).draws
    assert draws[0::2] == draws[1::2]
    assert len(set(draws)) == 4


def test_a_seeded_dataset_draws_the_same_numbers_with_any_number_of_workers():
    draws = instead(PRECEDENCE).draws
    assert draws[0] == draws[2]
    assert len(set(draws[0])) == 8


def test_a_batch_on_another_device_raises():
    page = copied(DEVICE)
    with pytest.raises(RuntimeError, match="device"):
        page.model(page.x)


def test_batches_are_moved_to_the_model_and_a_wrong_device_raises():
    page = instead(DEVICE)
    assert page.state.x.device == next(page.model.parameters()).device
    with pytest.raises(ValueError, match="device is 'meta' but the model is on"):
        page.create_trainer(page.model, page.optimizer, page.loss_fn, device="meta")


def test_a_wrapped_model_saves_names_that_the_plain_model_does_not_have():
    page = copied(DATA_PARALLEL)
    assert set(page.missing) == set(page.fresh.state_dict())
    assert all(name.startswith("module.") for name in page.unexpected)


def test_weights_of_a_wrapped_model_are_loaded_into_a_plain_model():
    page = instead(DATA_PARALLEL)
    assert all(map(torch.equal, page.wrapped.state_dict().values(), page.fresh.state_dict().values()))


def test_a_dict_is_unpacked_into_its_keys():
    page = copied(DICTS)
    assert (page.x, page.y) == ("image", "label")


def test_dicts_are_trained_on_with_compute_loss_or_prepare_batch():
    page = instead(DICTS)
    assert printed(DICTS, "instead") == "steps: 10\nsteps: 10\n"
    assert page.trainer.state.x.shape == (32, 64)


def test_samples_of_different_lengths_cannot_be_collated():
    page = copied(LENGTHS)
    with pytest.raises(RuntimeError, match="equal size"):
        next(iter(page.DataLoader(page.Ink(), batch_size=8)))


def test_a_plain_mean_includes_padding():
    page = copied(LENGTHS)
    assert 0.1 < (page.tokens == 0).float().mean() < 0.9


def test_windows_weighted_by_tokens_equal_a_large_batch():
    four, one = instead(LENGTHS).gradients
    assert torch.allclose(four, one, atol=1e-6)
    assert four.norm() > 0.01
