"""docs/from-your-loop/memory.md: the copied code and its replacements."""

import pytest
import torch
from snippet_pages import copied, instead

EMPTY_CACHE = "`torch.cuda.empty_cache()` in each iteration, and still out of memory"
SMALLER_BATCH = "Batch too large: CUDA out of memory"
IN_PLACE = "Save memory with `nn.ReLU(inplace=True)`"
CHECKPOINT = 'Activation checkpointing: "None of the inputs have requires_grad=True. Gradients will be None"'
CHANNELS_LAST = '`channels_last` and "view size is not compatible with input tensor\'s size and stride"'


def test_a_sum_of_losses_keeps_every_graph():
    grows = copied(EMPTY_CACHE).grows
    assert grows == pytest.approx([grows[0] * n for n in (1, 2, 3, 4)], rel=0.1)


def test_evaluation_and_logged_losses_keep_no_graph():
    page = instead(EMPTY_CACHE)
    assert page.memory.now == 0
    assert page.memory.most > 100
    assert len(page.losses) == 4


def test_a_smaller_batch_has_another_gradient():
    page = copied(SMALLER_BATCH)
    assert page.kilobytes[32] < 0.35 * page.kilobytes[128]
    assert page.difference > 0.3


def test_accumulation_has_the_same_gradient_in_less_memory():
    page = instead(SMALLER_BATCH)
    assert page.kilobytes[32] < 0.35 * page.kilobytes[128]
    assert page.difference < 1e-5


def test_an_in_place_relu_changes_the_input_of_a_residual():
    page = copied(IN_PLACE)
    x = torch.tensor([[-1.0] * 8])
    assert torch.allclose(page.wrong(x.clone()), page.block(x) + 1)


def test_half_precision_halves_the_memory():
    kilobytes = instead(IN_PLACE).kilobytes
    assert kilobytes["bf16"] < 0.6 * kilobytes[None]


def test_reentrant_checkpointing_trains_nothing():
    page = copied(CHECKPOINT)
    assert page.model.body[0].weight.grad is None
    assert page.model.head.weight.grad is not None


def test_checkpointing_gives_the_same_weights_in_less_memory():
    page = instead(CHECKPOINT)
    assert torch.equal(page.weights[None], page.weights[False])
    assert page.kilobytes["checkpointed"] < 0.3 * page.kilobytes["plain"]


def test_view_fails_on_channels_last():
    page = copied(CHANNELS_LAST)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        page.model(page.images.to(memory_format=torch.channels_last))


def test_batches_are_converted_to_channels_last():
    page = instead(CHANNELS_LAST)
    assert page.formats == [True] * 4
    assert page.trainer.state.optimizer_step == 4
