"""Models that are compiled as a whole or in parts, wrapped or not, are saved under the same plain names."""

from __future__ import annotations

import ignite.distributed as idist
import pytest
import torch
from compiled_parts import FORMS, NAMES, TwoParts, compiled, with_compiled_block
from torch import nn
from toys import same, trainer_of, weights

from camshaft import FreezeParameters, count_parameters, freeze, load_weights, save_weights
from camshaft.models import plain_name, plain_named_parameters, plain_state_dict, strip_wrapper_prefixes


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # Ignite would guess it, with a warning
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    idist.finalize()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_plain_names(form):
    model = FORMS[form](TwoParts(0))
    assert list(plain_state_dict(model)) == NAMES
    assert list(plain_named_parameters(model)) == NAMES
    assert same(list(plain_state_dict(model).values()), weights(TwoParts(0)))


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("loaded", FORMS)
def test_weights_are_loaded_from_any_form_into_any_other(saved, loaded, tmp_path):
    path = save_weights(FORMS[saved](TwoParts(0)), tmp_path / "weights.pt")
    assert list(torch.load(path, weights_only=True)) == NAMES
    model = FORMS[loaded](TwoParts(1))
    load_weights(model, path)
    assert same(weights(model), weights(TwoParts(0)))


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_that_torch_saved_is_loaded(form, tmp_path):
    torch.save(FORMS[form](TwoParts(0)).state_dict(), tmp_path / "weights.pt")
    model = with_compiled_block(TwoParts(1))
    load_weights(model, tmp_path / "weights.pt")
    assert same(weights(model), weights(TwoParts(0)))


@pytest.mark.parametrize("compile_part", [lambda model: model, with_compiled_block], ids=["plain", "compiled block"])
def test_ddp_saves_and_loads_the_plain_names(compile_part, one_process, tmp_path):
    model = nn.parallel.DistributedDataParallel(compile_part(TwoParts(0)))
    path = save_weights(model, tmp_path / "weights.pt")
    assert list(torch.load(path, weights_only=True)) == NAMES
    other = nn.parallel.DistributedDataParallel(with_compiled_block(TwoParts(1)))
    load_weights(other, path)
    assert same(weights(other), weights(TwoParts(0)))


@pytest.mark.parametrize("form", FORMS)
def test_patterns_match_the_plain_names(form):
    model = FORMS[form](TwoParts(0))
    assert freeze(model, "block.0.*") == ["block.0.weight", "block.0.bias"]
    assert count_parameters(model) == (30, 46)
    trained = TwoParts(0).requires_grad_(True)
    handler = FreezeParameters("block.*", until_step=2).attach(trainer_of(FORMS[form](trained)))
    assert handler is not None
    assert not any(p.requires_grad for p in trained.block.parameters())


def test_a_part_that_is_called_like_a_wrapper_keeps_its_name():
    model = nn.ModuleDict({"module": compiled(nn.Linear(3, 2))})
    own = plain_state_dict(model)
    assert list(own) == ["module.weight", "module.bias"]
    assert list(strip_wrapper_prefixes(model.state_dict(), own)) == ["module.weight", "module.bias"]
    assert plain_name("a._orig_mod.b._orig_mod.weight") == "a.b.weight"


def test_names_that_would_collide_are_kept():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1))
    model.part = nn.Module()
    model.part.weight = nn.Parameter(torch.zeros(1))
    model.part._orig_mod = nn.Linear(1, 1, bias=False)
    assert list(plain_state_dict(model)) == ["weight", "part.weight", "part._orig_mod.weight"]
