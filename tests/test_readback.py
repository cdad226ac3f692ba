"""Numbers are copied to the host in order, and nobody waits for them before they are read."""

import pytest
import torch
from slow_copies import SlowCopies

from camshaft.readback import Readback

MIXED = [torch.tensor(0.5), 2, torch.tensor([3], dtype=torch.int64), torch.tensor(-0.25, dtype=torch.float64), True, 0.1]


def test_numbers_and_tensors_of_any_kind_come_back_in_order():
    assert Readback(MIXED).floats() == [0.5, 2.0, 3.0, -0.25, 1.0, 0.1]


def test_no_values_are_no_copy():
    numbers = Readback([])
    assert numbers.is_ready()
    assert numbers.floats() == []


def test_python_numbers_need_no_copy(monkeypatch):
    copies = SlowCopies().install(monkeypatch)
    assert Readback([1, 2.5]).floats() == [1.0, 2.5]
    assert copies.started == 0


def test_a_tensor_may_be_overwritten_before_it_is_read(monkeypatch):
    SlowCopies().install(monkeypatch)
    value = torch.tensor(1.0)
    numbers = Readback([value])
    value.fill_(7)
    assert numbers.floats() == [1.0]


def test_all_tensors_of_a_device_are_one_copy_which_can_be_read_again(monkeypatch):
    copies = SlowCopies().install(monkeypatch)
    numbers = Readback(MIXED)
    assert not numbers.is_ready()
    assert (copies.started, copies.waits) == (1, 0)
    copies.arrive()
    assert numbers.is_ready()
    assert numbers.floats() == numbers.floats() == [0.5, 2.0, 3.0, -0.25, 1.0, 0.1]
    assert copies.waits == 0


def test_numbers_that_have_not_arrived_are_waited_for(monkeypatch):
    copies = SlowCopies().install(monkeypatch)
    assert Readback([torch.tensor(1.0)]).floats() == [1.0]
    assert copies.waits == 1


def test_more_than_one_element_is_an_error():
    with pytest.raises(RuntimeError):
        Readback([torch.zeros(2)]).floats()
