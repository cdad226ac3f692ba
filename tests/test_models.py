"""Models: unwrapping, training modes, counting and freezing parameters."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from toys import data_parallel, linear, same, sgd, trainer_of, weights

from camshaft import (
    FreezeParameters,
    count_parameters,
    freeze,
    unfreeze,
)
from camshaft.models import preserve_training_mode, strip_wrapper_prefixes, unwrap, without_prefixes


def tensor(*shape):
    return torch.ones(*shape)


def wrapped(model):
    return torch.compile(data_parallel(model), backend="eager")


def test_unwrap_returns_the_wrapped_model():
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
def test_wrapper_prefixes_shared_by_all_keys_are_removed(keys, expected):
    assert list(without_prefixes(dict.fromkeys(keys, 0))) == expected


def test_a_prefix_of_the_model_itself_is_kept():
    assert list(strip_wrapper_prefixes({"module.a": 0}, {"module.a": 1})) == ["module.a"]
    assert list(strip_wrapper_prefixes({"module.a": 0}, {"a": 1})) == ["a"]


def test_preserve_training_mode_restores_the_modes_after_an_exception():
    model = torch.nn.Sequential(linear(), torch.nn.BatchNorm1d(2))
    model[1].eval()

    def change_and_fail():
        model.eval()
        model[1].train()
        raise KeyError("out")

    with pytest.raises(KeyError, match="out"), preserve_training_mode(model):
        change_and_fail()
    assert [part.training for part in model.modules()] == [True, True, False]


def test_count_parameters_counts_a_shared_parameter_once():
    model = torch.nn.ModuleList([linear(), linear()])
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    counted = count_parameters(model)
    assert counted == (8, 10)
    assert (counted.trainable, counted.total) == (8, 10)


def two_layers():
    return torch.nn.Sequential(OrderedDict(encoder=torch.nn.Linear(3, 2), head=torch.nn.Linear(2, 1)))


@pytest.mark.parametrize("wrap", [lambda model: model, wrapped], ids=["plain", "wrapped"])
def test_freeze_and_unfreeze_match_patterns_inside_wrappers(wrap):
    model = two_layers()
    assert freeze(wrap(model), "encoder.*") == ["encoder.weight", "encoder.bias"]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert unfreeze(wrap(model), "*.bias") == ["encoder.bias", "head.bias"]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_freeze_clears_gradients_so_that_weight_decay_changes_nothing():
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
def test_freeze_with_an_unmatched_pattern_raises_and_freezes_nothing(patterns, text):
    model = two_layers()
    with pytest.raises(ValueError, match=text.replace("*", r"\*")):
        freeze(model, *patterns)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "use",
    [
        lambda: freeze(linear(), "weight", "encoder.*"),
        lambda: unfreeze(linear(), "encoder.*"),
        lambda: FreezeParameters("encoder.*").attach(trainer_of(linear())),
    ],
    ids=["freeze", "unfreeze", "FreezeParameters"],
)
def test_an_unmatched_pattern_raises_everywhere(use):
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no parameter; the model has weight, bias"):
        use()
