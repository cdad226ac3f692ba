"""The ground floor: batches, modules, files, metrics, rates and random states."""

import dataclasses
import os
import random
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from toys import batches, linear, same, sgd, trainer_of, weights

from camshaft import count_parameters, freeze, unfreeze
from camshaft.checkpoints.files import CheckpointError, load_checked, remove_temporary_files, save_durably, write_durably
from camshaft.checkpoints.index import Entry, retained
from camshaft.metrics import Metrics, MetricWatch, as_number, better
from camshaft.models import preserve_training_mode, strip_wrapper_prefixes, unwrap, without_prefixes
from camshaft.optimizers import group_rates
from camshaft.pytree import detach, map_tensors, num_samples, prepare_pair, tensors, to_device
from camshaft.rng import preserve_rng_state, restore_rng, rng_state

NAN, INF = float("nan"), float("inf")
Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: object = None


def tensor(*shape):
    return torch.ones(*shape)


# -- batches ----------------------------------------------------------------------------------------------------------

NESTS = {
    "tensor": tensor(2),
    "tuple": (tensor(2), "text", 3),
    "list": [tensor(2), [tensor(3)]],
    "named tuple": Pair(tensor(2), {"a": tensor(3)}),
    "dict": {"a": tensor(2), "b": {"c": tensor(3), "d": None}},
    "ordered dict": OrderedDict(a=tensor(2)),
    "dataclass": Sample(tensor(2), Sample(tensor(3))),
    "nothing": None,
    "empty": (),
}


def structure(nest):
    """A nest's types, with the tensors' sums."""
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
def test_mapping_keeps_the_structure_of_a_nest(name):
    assert structure(map_tensors(lambda t: t + 0, NESTS[name])) == structure(NESTS[name])


@pytest.mark.parametrize("name", NESTS)
def test_mapping_reaches_every_tensor(name):
    doubled = map_tensors(lambda t: t * 2, NESTS[name])
    assert [float(t.sum()) for t in tensors(doubled)] == [2 * float(t.sum()) for t in tensors(NESTS[name])]


def test_a_tensor_that_is_on_the_device_is_not_copied():
    x = tensor(2)
    assert to_device(x, "cpu") is x
    assert to_device((x,), None)[0] is x


def test_moving_reaches_every_tensor_of_a_nest():
    moved = to_device(NESTS["dict"], "meta")
    assert [t.device.type for t in tensors(moved)] == ["meta", "meta"]


def test_an_object_with_a_to_of_its_own_is_moved_by_it():
    packed = torch.nn.utils.rnn.pack_sequence([tensor(3), tensor(2)])
    assert to_device(packed, "meta").data.device.type == "meta"


def test_detached_cuts_every_tensor_off():
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
def test_the_length_is_that_of_the_first_tensor_with_one(batch, expected):
    assert num_samples(batch) == expected


def test_a_pair_is_taken_apart_whatever_it_holds():
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
def test_a_batch_that_is_no_pair_is_described(batch, text):
    with pytest.raises(TypeError, match=rf"a batch must be a pair \(x, y\), got {text}; pass prepare_batch="):
        prepare_pair(batch)


# -- modules ----------------------------------------------------------------------------------------------------------


def wrapped(model):
    return torch.compile(torch.nn.DataParallel(model), backend="eager")


def test_unwrapping_finds_the_model_inside():
    model = linear()
    assert unwrap(wrapped(model)) is model
    assert unwrap(model) is model


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["module.a", "module.b"], ["a", "b"]),
        (["_orig_mod.module.a"], ["a"]),
        (["module._orig_mod.module.a"], ["a"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["a"], ["a"]),
        ([], []),
    ],
)
def test_prefixes_that_all_keys_share_go(keys, expected):
    assert list(without_prefixes(dict.fromkeys(keys, 0))) == expected


def test_a_prefix_that_belongs_to_the_model_stays():
    assert list(strip_wrapper_prefixes({"module.a": 0}, {"module.a": 1})) == ["module.a"]
    assert list(strip_wrapper_prefixes({"module.a": 0}, {"a": 1})) == ["a"]


def test_flags_come_back_however_the_block_is_left():
    model = torch.nn.Sequential(linear(), torch.nn.BatchNorm1d(2))
    model[1].eval()

    def disturb():
        model.eval()
        model[1].train()
        raise KeyError("out")

    with pytest.raises(KeyError, match="out"), preserve_training_mode(model):
        disturb()
    assert [part.training for part in model.modules()] == [True, True, False]


def test_counting_counts_a_shared_parameter_once():
    model = torch.nn.ModuleList([linear(), linear()])
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    counted = count_parameters(model)
    assert counted == (8, 10)
    assert (counted.trainable, counted.total) == (8, 10)


def two_layers():
    return torch.nn.Sequential(OrderedDict(encoder=torch.nn.Linear(3, 2), head=torch.nn.Linear(2, 1)))


@pytest.mark.parametrize("wrap", [lambda model: model, wrapped], ids=["plain", "wrapped"])
def test_freezing_goes_by_pattern_and_sees_through_wrappers(wrap):
    model = two_layers()
    assert freeze(wrap(model), "encoder.*") == ["encoder.weight", "encoder.bias"]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert unfreeze(wrap(model), "*.bias") == ["encoder.bias", "head.bias"]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_freezing_lets_go_of_the_gradient_so_that_weight_decay_moves_nothing():
    model = two_layers()
    optimizer = sgd(model, momentum=0.9, weight_decay=0.1)
    model(tensor(1, 3)).sum().backward()
    optimizer.step()
    freeze(model, "encoder.*")
    before = weights(model.encoder)
    optimizer.step()
    assert same(weights(model.encoder), before)


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        (["decoder.*"], "the pattern 'decoder.*' matches no parameter; the model has encoder.weight, encoder.bias"),
        (["encoder.*", "x"], "the pattern 'x' matches no parameter"),
        ([], "name at least one pattern"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_and_freezes_nothing(patterns, text):
    model = two_layers()
    with pytest.raises(ValueError, match=text.replace("*", r"\*")):
        freeze(model, *patterns)
    assert all(p.requires_grad for p in model.parameters())


# -- files ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path):
    content = {"weights": weights(linear()), "numbers": [1, 2.5, None, True], "text": "a"}
    size = save_durably(content, tmp_path / "file.pt")
    found = load_checked(tmp_path / "file.pt")
    assert same(found.pop("weights"), content.pop("weights"))
    assert found == content
    assert size == (tmp_path / "file.pt").stat().st_size


def test_any_torch_load_reads_a_sealed_file(tmp_path):
    save_durably({"a": torch.arange(3)}, tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt", weights_only=True)["a"].tolist() == [0, 1, 2]


def test_every_single_flipped_bit_of_a_small_file_is_found(tmp_path):
    path = tmp_path / "file.pt"
    save_durably([1], path)
    good = path.read_bytes()
    for position in range(0, len(good), 13):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match=r"file\.pt"):
            load_checked(path)


def test_a_writer_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_durably(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_durably(tmp_path / "file", lambda file: file.write(b"text"))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_an_unsealed_file_is_read_only_where_that_is_allowed(tmp_path):
    torch.save([1], tmp_path / "file.pt")
    assert load_checked(tmp_path / "file.pt", sealed=False) == [1]
    with pytest.raises(CheckpointError, match="doesn't end with its checksum"):
        load_checked(tmp_path / "file.pt")


def test_a_folder_and_a_missing_file_are_said_to_be_that(tmp_path):
    with pytest.raises(CheckpointError, match="is not a file"):
        load_checked(tmp_path)
    with pytest.raises(CheckpointError, match="isn't there"):
        load_checked(tmp_path / "nothing.pt")


def test_litter_goes_and_everything_else_stays(tmp_path):
    for name in (".camshaft-1.tmp", ".camshaft-2.tmp", "file.tmp", "step-00000001.pt"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.tmp", "step-00000001.pt"]


# -- rotation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "keep_last", "keep_best", "mode", "expected"),
    [
        ([1, 2, 3, 4], 2, 0, "max", [3, 4]),
        ([4, 3, 2, 1], 1, 1, "max", [1, 4]),
        ([4, 3, 2, 1], 1, 2, "max", [1, 2, 4]),
        ([4, 3, 2, 1], 1, 2, "min", [3, 4]),
        ([5, 5, 5, 1], 1, 1, "max", [1, 4]),
        ([5, 5, 5, 9], 1, 1, "min", [1, 4]),
        ([None, 3, None, None], 1, 2, "max", [2, 4]),
        ([0.0, None, -1.0, None], 1, 1, "max", [1, 4]),
        ([1], 3, 3, "max", [1]),
        ([], 3, 3, "max", []),
    ],
)
def test_the_last_and_the_best_are_kept_in_order(scores, keep_last, keep_best, mode, expected):
    entries = [Entry(f"step-{n:08d}.pt", n, n, 1, score) for n, score in enumerate(scores, start=1)]
    assert [entry.optimizer_step for entry in retained(entries, keep_last, keep_best, mode)] == expected


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "best", "mode", "delta", "expected"),
    [
        (1.0, None, "max", 0.0, True),
        (1.0, 1.0, "max", 0.0, False),
        (1.1, 1.0, "max", 0.0, True),
        (1.1, 1.0, "max", 0.2, False),
        (0.9, 1.0, "min", 0.0, True),
        (0.9, 1.0, "min", 0.2, False),
        (-2.0, -1.0, "min", 0.5, True),
        (NAN, None, "max", 0.0, False),
        (INF, 1.0, "max", 0.0, False),
        (-INF, 1.0, "min", 0.0, False),
    ],
)
def test_better_is_strict_and_finite(score, best, mode, delta, expected):
    assert better(score, best, mode, delta) is expected


WRITES = {
    "item": lambda m: m.__setitem__("a", 1),
    "update": lambda m: m.update(a=1),
    "update of a mapping": lambda m: m.update({"a": 1}),
    "or": lambda m: m.__ior__({"a": 1}),
    "setdefault": lambda m: (m.pop("a", None), m.setdefault("a", 1)),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_way_of_writing_a_metric_counts(name):
    metrics = Metrics(a=0)
    before, version = metrics.writes["a"], metrics.version
    WRITES[name](metrics)
    assert metrics["a"] == 1
    assert metrics.writes["a"] == before + 1
    assert metrics.version == version + 1


def test_a_recalled_metric_is_there_and_not_new():
    metrics = Metrics()
    metrics.recall({"a": 1})
    assert metrics == {"a": 1}
    assert metrics.writes["a"] == 0


def test_a_watch_sees_each_writing_once_even_of_the_same_value():
    trainer = trainer_of()
    watch = MetricWatch("a", "Test")
    for _ in range(3):
        trainer.state.metrics["a"] = 1.0
        assert watch.is_new(trainer)
        assert watch.take(trainer) == 1.0
        assert not watch.is_new(trainer)


def test_a_watch_sees_metrics_that_are_replaced_as_a_whole():
    trainer = trainer_of()
    watch = MetricWatch("a", "Test")
    for value in (1.0, 2.0, 3.0):
        trainer.state.metrics = {"a": value}
        assert watch.is_new(trainer)
        assert watch.take(trainer) == value


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2), torch.tensor([[2.0]]), np.float32(2), np.array(2)])
def test_a_single_number_of_any_kind_is_one(value):
    assert as_number(value, "score") == 2.0


@pytest.mark.parametrize("value", [None, "high", torch.ones(2), [1.0], {}])
def test_anything_else_is_an_error_that_shows_it(value):
    with pytest.raises(TypeError, match="score must be a single number, got"):
        as_number(value, "score")


# -- rates and randomness ---------------------------------------------------------------------------------------------


def test_rates_go_by_name_or_number():
    model = two_layers()
    one = torch.optim.SGD(model.parameters(), lr=0.5)
    groups = [{"params": model.encoder.parameters(), "name": "body", "lr": 1}, {"params": model.head.parameters()}]
    two = torch.optim.SGD(groups, lr=torch.tensor(0.25))
    assert group_rates([one]) == [("lr", 0.5)]
    assert group_rates([two]) == [("lr/body", 1.0), ("lr/1", 0.25)]


def drawn():
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def test_every_generator_goes_on_from_where_its_state_was_taken(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both keep a second number in hand
    save_durably(rng_state(), tmp_path / "rng.pt")
    expected = [drawn() for _ in range(3)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    restore_rng(load_checked(tmp_path / "rng.pt"))
    assert [drawn() for _ in range(3)] == expected


def test_kept_generators_are_as_before_however_the_block_is_left():
    expected = (lambda state: (drawn(), restore_rng(state))[0])(rng_state())

    def disturb():
        drawn()
        raise KeyError("out")

    with pytest.raises(KeyError, match="out"), preserve_rng_state():
        disturb()
    assert drawn() == expected


def test_the_toys_are_the_same_at_every_call():
    assert same([t for pair in batches() for t in pair], [t for pair in batches() for t in pair])
    assert same(weights(linear()), weights(linear()))
