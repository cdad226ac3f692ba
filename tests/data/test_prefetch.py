"""A loader that is one batch ahead."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from camshaft import Prefetch, create_trainer


class Loud:
    """Batches that are numbered, and say when they are fetched."""

    def __init__(self, number=4, broken=None):
        self.number, self.broken, self.fetched = number, broken, []

    def __len__(self):
        return self.number

    def __iter__(self):
        for index in range(self.number):
            if index == self.broken:
                raise ValueError("this one is spoiled")
            self.fetched.append(index)
            yield {"x": torch.full((2, 1), float(index)), "name": str(index)}


def test_each_batch_comes_once_and_in_order_in_every_pass():
    ahead = Prefetch(Loud(), "cpu")
    for _ in range(2):
        assert [batch["name"] for batch in ahead] == ["0", "1", "2", "3"]


def test_it_is_one_batch_ahead():
    loud = Loud()
    batches = iter(Prefetch(loud, "cpu"))
    assert loud.fetched == []
    next(batches)
    assert loud.fetched == [0, 1]


def test_it_stays_ended():
    batches = iter(Prefetch([1], "cpu"))
    assert next(batches) == 1
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)


def test_an_error_shows_at_its_own_batch():
    loud = Loud(broken=2)
    model = torch.nn.Linear(1, 1)
    trainer = create_trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), None, compute_loss=lambda model, batch: model(batch["x"]).mean()
    )
    with pytest.raises(ValueError, match="spoiled") as caught:
        trainer.run(Prefetch(loud, "cpu"))
    assert trainer.state.iteration == 2
    assert "camshaft: in epoch 1, iteration 2" in caught.value.__notes__


def test_tensors_of_any_nest_are_moved_and_the_rest_is_kept():
    batches = [({"x": torch.ones(2)}, ["a", torch.zeros(1)])]
    x, (name, y) = next(iter(Prefetch(batches, "meta")))
    assert (x["x"].device.type, y.device.type, name) == ("meta", "meta", "a")


def test_its_length_is_the_loaders():
    assert len(Prefetch(Loud(7), "cpu")) == 7


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(5.0))


@pytest.mark.parametrize("loader", [DataLoader(Stream(), batch_size=2), (batch for batch in [1, 2])])
def test_no_length_where_the_loader_has_none(loader):
    with pytest.raises(TypeError, match="len|length"):
        len(Prefetch(loader, "cpu"))


@pytest.mark.parametrize("loader", [7, None, Prefetch([1], "cpu")])
def test_what_is_no_loader_is_an_error(loader):
    with pytest.raises(TypeError, match="loader must be an iterable of batches that isn't prefetched yet, got a"):
        Prefetch(loader, "cpu")


def test_an_unknown_device_is_an_error_at_once():
    with pytest.raises(RuntimeError, match="quantum"):
        Prefetch([1], "quantum")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error_at_once():
    with pytest.raises(RuntimeError, match="device is 'cuda:3', and torch finds no CUDA device"):
        Prefetch([1], "cuda:3")
