"""Nested batches: mapping, moving and measuring their tensors."""

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from toys import linear

from camshaft.pytree import detach, map_tensors, num_samples, prepare_pair, tensors, to_device

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: object = None


def tensor(*shape):
    return torch.ones(*shape)


NESTS = {
    "tensor": tensor(2),
    "tuple": (tensor(2), "text", 3),
    "list": [tensor(2), [tensor(3)]],
    "named tuple": Pair(tensor(2), {"a": tensor(3)}),
    "dict": {"a": tensor(2), "b": {"c": tensor(3), "d": None}},
    "ordered dict": OrderedDict(a=tensor(2)),
    "dataclass": Sample(tensor(2), Sample(tensor(3))),
    "none": None,
    "empty": (),
}


def structure(nest):
    """The types of nested containers, with each tensor replaced by its sum."""
    if isinstance(nest, torch.Tensor):
        return float(nest.sum())
    if dataclasses.is_dataclass(nest):
        return type(nest), [structure(getattr(nest, field.name)) for field in dataclasses.fields(nest)]
    if isinstance(nest, dict):
        return type(nest), [(key, structure(value)) for key, value in nest.items()]
    if isinstance(nest, (list, tuple)):
        return type(nest), [structure(item) for item in nest]
    return nest


@pytest.mark.parametrize("name", NESTS)
def test_map_tensors_keeps_the_structure(name):
    assert structure(map_tensors(lambda t: t + 0, NESTS[name])) == structure(NESTS[name])


@pytest.mark.parametrize("name", NESTS)
def test_map_tensors_applies_to_every_tensor(name):
    doubled = map_tensors(lambda t: t * 2, NESTS[name])
    assert [float(t.sum()) for t in tensors(doubled)] == [2 * float(t.sum()) for t in tensors(NESTS[name])]


def test_a_tensor_already_on_the_device_is_not_copied():
    x = tensor(2)
    assert to_device(x, "cpu") is x
    assert to_device((x,), None)[0] is x


def test_to_device_moves_every_nested_tensor():
    moved = to_device(NESTS["dict"], "meta")
    assert [t.device.type for t in tensors(moved)] == ["meta", "meta"]


def test_an_object_with_a_to_method_is_moved_by_calling_it():
    packed = torch.nn.utils.rnn.pack_sequence([tensor(3), tensor(2)])
    assert to_device(packed, "meta").data.device.type == "meta"


def test_detach_detaches_every_tensor():
    y = linear()(tensor(1, 3))
    assert not any(t.requires_grad for t in tensors(detach({"a": y, "b": [y]})))


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (tensor(5, 2), 5),
        ((tensor(4), tensor(3)), 4),
        ({"scale": torch.tensor(1.0), "x": tensor(6)}, 6),
        ([{"a": tensor(7)}], 7),
        (Sample(tensor(8)), 8),
        (Pair("text", tensor(9)), 9),
        (torch.tensor(1.0), None),
        (["text"], None),
        ((), None),
        (None, None),
    ],
)
def test_num_samples_is_the_length_of_the_first_tensor_with_dimensions(batch, expected):
    assert num_samples(batch) == expected


def test_prepare_pair_moves_nested_inputs_and_targets():
    x, y = prepare_pair(({"a": tensor(2)}, [tensor(3)]), device="meta")
    assert (x["a"].device.type, y[0].device.type) == ("meta", "meta")


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (tensor(2, 3), r"a tensor of shape \(2, 3\)"),
        ({"x": 1, "y": 2}, r"a dict with the keys \['x', 'y'\]"),
        ((1, 2, 3), "a tuple of 3"),
        ([1], "a list of 1"),
        ("xy", "a str"),
        (None, "a NoneType"),
    ],
)
def test_prepare_pair_describes_a_batch_that_is_not_a_pair(batch, text):
    with pytest.raises(TypeError, match=rf"a batch must be a pair \(x, y\), got {text}; pass prepare_batch="):
        prepare_pair(batch)
