"""Saving in the background on a GPU: training does not wait, and the file holds the weights of that moment."""

import pytest
import torch
from torch import nn

from camshaft.checkpoints import snapshot as module
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.index import Entry, Index
from camshaft.checkpoints.names import file_name
from camshaft.checkpoints.writer import CheckpointWriter

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(params=[True, False], ids=["room", "no room"])
def room(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(module, "has_room", lambda *_: False)
    yield request.param
    torch.cuda.set_sync_debug_mode("default")


def state():
    """Weights that take a while to copy, and other tensors."""
    torch.manual_seed(0)
    weights = [torch.randn(2048, 2048, device=DEVICE) for _ in range(8)]
    odd = [
        torch.randn(64, 32, device=DEVICE).t(),
        torch.empty(0, device=DEVICE),
        torch.ones(3, dtype=torch.bool, device=DEVICE),
    ]
    return {"weights": weights, "tied": weights[0], "odd": odd, "half": torch.ones(5, device=DEVICE).bfloat16(), "step": 3}


def save(writer, content, step):
    """Saves without a wait for the device, overwrites the weights at once, and returns what the file holds."""
    torch.cuda.set_sync_debug_mode("error")
    path = writer.write(content, Entry(file_name(step), step, step, 1))
    for weight in content["weights"]:
        weight.add_(1)
    torch.cuda.set_sync_debug_mode("default")
    assert writer.wait()
    return load_checked(path)


def writer_of(folder):
    return CheckpointWriter(Index(folder), lambda entries: entries[-2:], background=True)


def test_a_save_does_not_wait_and_holds_the_values_of_its_moment(tmp_path, room):
    writer, content = writer_of(tmp_path), state()
    writer.write(content, Entry(file_name(1), 1, 1, 1))  # makes the pinned memory
    assert writer.wait()
    for step in range(2, 6):
        wanted = [weight.cpu() for weight in content["weights"]]
        found = save(writer, content, step)
        assert all(map(torch.equal, found["weights"], wanted))
        assert found["tied"].equal(wanted[0])
        assert all(left.equal(right.cpu()) for left, right in zip(found["odd"], content["odd"], strict=True))


def test_a_save_behind_queued_work_holds_the_result_of_that_work(tmp_path, room):
    writer, content = writer_of(tmp_path), state()
    writer.write(content, Entry(file_name(1), 1, 1, 1))
    assert writer.wait()
    expected = content["weights"][0].clone()
    for _ in range(200):
        expected.mul_(1.5).div_(1.5)
    torch.cuda.synchronize()
    for _ in range(200):
        content["weights"][0].mul_(1.5).div_(1.5)
    assert save(writer, content, 2)["weights"][0].equal(expected.cpu())


def test_the_memory_does_not_grow_and_is_freed(tmp_path, room):
    writer, content = writer_of(tmp_path), state()
    before, allocated = torch.cuda.memory_allocated(), []
    for step in range(1, 5):
        save(writer, content, step) if step > 1 else writer.write(content, Entry(file_name(1), 1, 1, 1))
        assert writer.wait()
        allocated.append(torch.cuda.memory_allocated())
    assert len(set(allocated)) == 1
    assert (allocated[0] > before) == room
    writer.close()
    assert torch.cuda.memory_allocated() == before


def test_pinned_memory_is_used(tmp_path, room):
    snapshot = module.Snapshot()
    found = snapshot.take(nn.Linear(3, 3).to(DEVICE).state_dict())()
    assert all(tensor.is_pinned() for tensor in found.values())
