"""`Prefetch`: a loader that fetches one batch ahead."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from camshaft import Prefetch, create_trainer


class RecordingLoader:
    """A loader of numbered batches that records which ones were fetched."""

    def __init__(self, number=4, broken=None):
        self.number, self.broken, self.fetched = number, broken, []

    def __len__(self):
        return self.number

    def __iter__(self):
        for index in range(self.number):
            if index == self.broken:
                raise ValueError("a broken batch")
            self.fetched.append(index)
            yield {"x": torch.full((2, 1), float(index)), "name": str(index)}


def test_each_pass_gives_every_batch_once_and_in_order():
    ahead = Prefetch(RecordingLoader(), "cpu")
    for _ in range(2):
        assert [batch["name"] for batch in ahead] == ["0", "1", "2", "3"]


def test_it_is_one_batch_ahead():
    loader = RecordingLoader()
    batches = iter(Prefetch(loader, "cpu"))
    assert loader.fetched == []
    next(batches)
    assert loader.fetched == [0, 1]


def test_an_exhausted_iterator_stays_exhausted():
    batches = iter(Prefetch([1], "cpu"))
    assert next(batches) == 1
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)


def test_an_error_is_raised_at_its_own_batch():
    loader = RecordingLoader(broken=2)
    model = torch.nn.Linear(1, 1)
    trainer = create_trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), None, compute_loss=lambda model, batch: model(batch["x"]).mean()
    )
    with pytest.raises(ValueError, match="a broken batch") as caught:
        trainer.run(Prefetch(loader, "cpu"))
    assert trainer.state.iteration == 2
    assert "camshaft: in epoch 1, iteration 2" in caught.value.__notes__


def test_the_batches_after_an_error_can_still_be_fetched():
    class BrokenAtOne(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise ValueError("a broken sample")
            return float(index)

    batches = iter(Prefetch(DataLoader(BrokenAtOne(), batch_size=None), "cpu"))
    assert next(batches) == 0.0
    with pytest.raises(ValueError, match="a broken sample"):
        next(batches)
    assert list(batches) == [2.0]


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("broken", [None, 2])
def test_an_iterator_is_freed_with_its_last_reference(broken, no_collector):
    """The traceback of an error that it fetched ahead, or of the end of the data, must not keep it alive."""
    batches = iter(Prefetch(RecordingLoader(broken=broken), "cpu"))
    watched = weakref.ref(batches)
    with suppress(ValueError):
        for _ in batches:
            pass
    del batches
    assert watched() is None


def test_nested_tensors_are_moved_and_other_values_are_kept():
    batches = [({"x": torch.ones(2)}, ["a", torch.zeros(1)])]
    x, (name, y) = next(iter(Prefetch(batches, "meta")))
    assert (x["x"].device.type, y.device.type, name) == ("meta", "meta", "a")


def test_its_length_is_that_of_the_loader():
    assert len(Prefetch(RecordingLoader(7), "cpu")) == 7


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(5.0))


@pytest.mark.parametrize("loader", [DataLoader(Stream(), batch_size=2), (batch for batch in [1, 2])])
def test_it_has_no_length_if_the_loader_has_none(loader):
    with pytest.raises(TypeError, match="len|length"):
        len(Prefetch(loader, "cpu"))


@pytest.mark.parametrize("loader", [7, None, Prefetch([1], "cpu")])
def test_an_object_that_is_not_a_loader_raises(loader):
    with pytest.raises(TypeError, match="loader must be an iterable of batches, and not a Prefetch already, got a"):
        Prefetch(loader, "cpu")


def test_an_unknown_device_raises_immediately():
    with pytest.raises(RuntimeError, match="quantum"):
        Prefetch([1], "quantum")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_raises_immediately():
    with pytest.raises(RuntimeError, match="device is 'cuda:3', but torch finds no CUDA device"):
        Prefetch([1], "cuda:3")
