"""Copies of tensors that training overwrites at once: their values, and the memory that is kept for them."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from camshaft.checkpoints import snapshot as module
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.index import Entry, Index
from camshaft.checkpoints.names import file_name
from camshaft.checkpoints.snapshot import Snapshot
from camshaft.checkpoints.writer import CheckpointWriter


class Event:
    """An event of the fake device, whose work is always done."""

    def synchronize(self):
        assert threading.current_thread() is not threading.main_thread(), "training waits for the device"


class Stream:
    """A stream of the fake device."""

    def __init__(self, device=None):
        pass

    def record_event(self):
        return Event()

    def wait_event(self, event):
        assert isinstance(event, Event)

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class Accelerator:
    """A module like ``torch.cuda`` for an accelerator that is the CPU, and works at once."""

    Stream = Stream
    free = 1 << 40

    def current_stream(self, device):
        return Stream()

    @contextmanager
    def stream(self, stream):
        yield

    def mem_get_info(self, device):
        return self.free, 1 << 40


@pytest.fixture(params=["host", "device", "device without room", "device without pinned memory"])
def where(request, monkeypatch):
    """Lets tensors of the CPU take each of the ways to the host."""
    if request.param != "host":
        fake = Accelerator()
        fake.free = 0 if request.param == "device without room" else fake.free
        monkeypatch.setattr(module, "accelerator", lambda device: fake if device.type == "cpu" else None)
        if request.param != "device without pinned memory":
            monkeypatch.setattr(module, "pinned_like", torch.empty_like)
        else:
            monkeypatch.setattr(module, "pinned_like", out_of_memory)
    return request.param


def out_of_memory(tensor):
    raise RuntimeError("CUDA error: out of memory")


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def nest():
    """Tensors of every kind that a checkpoint may contain, and plain values."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    return {
        "weight": weight,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "tied": [weight, weight],
        "view": weight[1:3],
        "transposed": weight.t(),
        "every second column": weight[:, ::2],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "sparse": torch.eye(3).to_sparse(),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "types": tuple(torch.ones(2, dtype=dtype) for dtype in sorted(module.DTYPES, key=str)),
        "float8": torch.ones(4).to(torch.float8_e5m2),
        "uint16": torch.ones(4, dtype=torch.uint16),
        "plain": [1, "a", None, {"deep": (torch.arange(3), 2.5)}],
    }


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]


def expected(content):
    """What a plain copy of each tensor gives."""
    return [leaf.detach().to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves(content)]


def check_equal(found, wanted):
    for left, right in zip(leaves(found), wanted, strict=True):
        if not isinstance(right, torch.Tensor):
            assert left == right
            continue
        assert type(left) is torch.Tensor
        assert (left.dtype, left.shape, left.layout, left.requires_grad) == (right.dtype, right.shape, right.layout, False)
        if right.layout is torch.strided:
            assert left.stride() == right.stride()
            assert as_bytes(left) == as_bytes(right)
        else:
            assert left.to_dense().equal(right.to_dense())


def as_bytes(tensor):
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()


def overwrite(content):
    for leaf in leaves(content):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.dtype in module.DTYPES:
            source = leaf.detach()
            source[..., :1].zero_() if source.dim() else source.zero_()


def test_the_copy_holds_the_values_at_the_time_of_the_request(where):
    snapshot = Snapshot()
    for _ in range(3):  # the later ones reuse memory
        content = nest()
        wanted = expected(content)
        fetch = snapshot.take(content)
        overwrite(content)
        check_equal(in_thread(fetch), wanted)


def test_nothing_in_the_copy_shares_memory(where):
    found = in_thread(Snapshot().take(nest()))
    storages = [
        leaf.untyped_storage().data_ptr()
        for leaf in leaves(found)
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.numel()
    ]
    assert len(set(storages)) == len(storages)


def test_the_nest_is_that_of_the_request(where):
    content = {"x": [torch.zeros(1)]}
    fetch = Snapshot().take(content)
    content["x"].append(torch.ones(1))
    content["y"] = 1
    assert in_thread(fetch) == {"x": [torch.zeros(1)]}


def addresses(snapshot, *shapes):
    found = in_thread(snapshot.take([torch.ones(shape) for shape in shapes]))
    return [tensor.data_ptr() for tensor in found]


def test_the_memory_is_reused(where):
    if where == "device without pinned memory":
        pytest.skip("nothing on the host is kept")
    snapshot = Snapshot()
    first = addresses(snapshot, 100, (2, 3), 100)
    assert addresses(snapshot, 100, (2, 3), 100) == first
    assert set(addresses(snapshot, (2, 3), 50, 100)) & set(first) == set(first[:2])


def kept(snapshot):
    return [
        target
        for copies in snapshot._devices.values()
        for pool in vars(copies).values()
        if isinstance(pool, module._Kept)
        for targets in pool._kept.values()
        for target in targets
    ]


def test_only_one_copy_is_kept(where):
    snapshot = Snapshot()
    for size in (5, 6, 7):
        in_thread(snapshot.take([torch.ones(size), torch.ones(size)]))
        assert {target.shape for target in kept(snapshot)} <= {(size,)}
        assert len(kept(snapshot)) == (4 if where == "device" else 2)


def test_the_memory_of_other_shapes_is_freed_before_new_memory_is_made():
    alive = []

    def make(source):
        alive.append([reference() for reference in old])
        return torch.empty_like(source)

    old = []
    pool = module._Kept(make)
    old = [weakref.ref(target) for target in pool.like([torch.ones(5), torch.ones(5)])]
    alive.clear()
    pool.like([torch.ones(6)])
    assert alive == [[None, None]]


def test_what_is_released_is_freed(where):
    snapshot = Snapshot()
    in_thread(snapshot.take(nest()))
    targets = [weakref.ref(target) for target in kept(snapshot)]
    assert targets
    snapshot.release()
    assert [target() for target in targets] == [None] * len(targets)
    assert addresses(snapshot, 3)


def test_no_tensor_of_the_training_is_kept(where):
    snapshot, weight = Snapshot(), torch.ones(3)
    watched = weakref.ref(weight)
    fetch = snapshot.take([weight])
    del weight
    assert watched() is None
    in_thread(fetch)


def test_a_device_that_is_full_by_now_is_not_asked_for_more(monkeypatch):
    fake = Accelerator()
    monkeypatch.setattr(module, "accelerator", lambda device: fake if device.type == "cpu" else None)
    monkeypatch.setattr(module, "pinned_like", torch.empty_like)
    snapshot = Snapshot()
    addresses(snapshot, 3)
    fake.free = 0
    addresses(snapshot, 3)  # what is kept needs no more
    assert len(kept(snapshot)) == 2
    addresses(snapshot, 3, 3)
    assert len(kept(snapshot)) == 2  # both on the host


def test_without_memory_to_keep_the_copy_is_a_plain_one(where, monkeypatch):
    monkeypatch.setattr(module._Kept, "like", lambda self, sources: out_of_memory(None))
    content, snapshot = nest(), Snapshot()
    wanted = expected(content)
    check_equal(in_thread(snapshot.take(content)), wanted)
    assert kept(snapshot) == []


def test_memory_made_in_inference_mode_serves_later_saves(where):
    snapshot = Snapshot()
    with torch.inference_mode():
        fetch = snapshot.take([torch.ones(3)])
    assert in_thread(fetch)[0].tolist() == [1, 1, 1]
    assert in_thread(snapshot.take([torch.zeros(3)]))[0].tolist() == [0, 0, 0]


def entry(step):
    return Entry(file_name(step), step, step, 1)


def test_a_writer_reads_back_what_was_there_and_frees_the_memory_when_closed(tmp_path, where):
    writer, weight = CheckpointWriter(Index(tmp_path), lambda entries: entries, background=True), torch.zeros(1000)
    for step in range(1, 5):
        weight.fill_(step)
        writer.write({"weight": weight}, entry(step))
        weight.fill_(-1)  # training continues
    assert kept(writer._snapshot)
    assert writer.close()
    assert kept(writer._snapshot) == []
    found = [load_checked(tmp_path / file_name(step))["weight"] for step in range(1, 5)]
    assert [weight.unique().tolist() for weight in found] == [[1], [2], [3], [4]]
