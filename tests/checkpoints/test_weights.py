"""`save_weights` and `load_weights`: files with weights alone, which `torch.load` can read."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import batches, data_parallel, linear, model_of, same, sgd, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    load_weights,
    save_weights,
)
from camshaft.checkpoints.files import CheckpointError


def other_model():
    torch.manual_seed(99)
    return torch.nn.Linear(3, 2)


WRAPPERS = {
    "plain": lambda model: model,
    "DataParallel": data_parallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled DataParallel": lambda model: torch.compile(data_parallel(model), backend="eager"),
}


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("loaded", WRAPPERS)
def test_weights_are_loaded_with_any_combination_of_wrappers(saved, loaded, tmp_path):
    path = save_weights(WRAPPERS[saved](linear()), tmp_path / "weights.pt")
    model = other_model()
    load_weights(WRAPPERS[loaded](model), path)
    assert same(weights(model), weights(linear()))


def test_torch_load_reads_the_file(tmp_path):
    path = save_weights(data_parallel(linear()), tmp_path / "weights.pt")
    content = torch.load(path, weights_only=True)
    assert list(content) == ["weight", "bias"]
    assert torch.equal(content["weight"], linear().weight)


def test_save_weights_creates_the_folder_and_returns_the_path(tmp_path):
    path = tmp_path / "new" / "folder" / "weights.pt"
    assert save_weights(linear(), str(path)) == path
    assert path.is_file()


def test_a_plain_state_dict_is_loaded(tmp_path):
    torch.save(linear().state_dict(), tmp_path / "weights.pt")
    model = other_model()
    load_weights(model, tmp_path / "weights.pt")
    assert same(weights(model), weights(linear()))


def test_the_weights_of_a_checkpoint_are_loaded(tmp_path):
    trainer = trainer_of()
    checkpoints = CheckpointRotation(tmp_path).attach(trainer)
    trainer.run(batches(3))
    model = other_model()
    load_weights(model, checkpoints.last)
    assert same(weights(model), weights(model_of(trainer)))


def test_saving_again_replaces_the_file_and_leaves_no_temporary_file(tmp_path):
    path = save_weights(other_model(), tmp_path / "weights.pt")
    save_weights(linear(), path)
    model = other_model()
    load_weights(model, path)
    assert same(weights(model), weights(linear()))
    assert list(tmp_path.iterdir()) == [path]


def bad_files(folder):
    torch.save({"weight": linear}, folder / "code.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "text.pt").write_text("no weights")
    data = bytearray(save_weights(linear(), folder / "flipped.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "flipped.pt").write_bytes(data)
    return {
        "missing.pt": "does not exist",
        "code.pt": "holds more than tensors and plain values",
        "list.pt": "holds a list, not a state dict",
        "text.pt": "is damaged or no checkpoint",
        "flipped.pt": "is damaged",
    }


@pytest.mark.parametrize("name", ["missing.pt", "code.pt", "list.pt", "text.pt", "flipped.pt"])
def test_an_unusable_file_raises_and_changes_nothing(name, tmp_path):
    text = bad_files(tmp_path)[name]
    model = other_model()
    before = weights(model)
    error = FileNotFoundError if name == "missing.pt" else RuntimeError
    with pytest.raises(error, match=f"{name} {text}|{name} .*{text}"):
        load_weights(model, tmp_path / name)
    assert same(weights(model), before)


def test_weights_of_another_model_raise_and_name_the_keys(tmp_path):
    path = save_weights(torch.nn.Sequential(linear()), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="another model than this Linear: only the checkpoint has 0.weight, 0.bias; only the"):
        load_weights(linear(), path)


def test_weights_of_another_shape_raise_and_name_the_shapes(tmp_path):
    path = save_weights(torch.nn.Linear(4, 2), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weight \(\(2, 4\) in the checkpoint, \(2, 3\) here\)"):
        load_weights(linear(), path)


def test_names_that_start_like_a_wrapper_prefix_are_kept(tmp_path):
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = linear()

    path = save_weights(Outer(), tmp_path / "weights.pt")
    model = Outer()
    torch.nn.init.zeros_(model.module.weight)
    load_weights(model, path)
    assert torch.equal(model.module.weight, linear().weight)


def test_load_weights_rejects_other_models_and_missing_files(tmp_path):
    path = save_weights(linear(), tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"weights\.pt was written for another model than this Linear: these have other shapes"
    ):
        load_weights(nn.Linear(3, 4), path)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt does not exist"):
        load_weights(linear(), tmp_path / "missing.pt")


def test_weights_nested_in_a_larger_dict_raise_and_show_how_to_load_them(tmp_path):
    model = linear()
    content = {"epoch": 3, "optimizer": sgd(model).state_dict(), "model": data_parallel(model).state_dict()}
    torch.save(content, tmp_path / "epoch3.pt")
    match = r"epoch3\.pt holds more .* be under 'model'; load them by model\.load_state_dict\(torch\.load\('.*\)\['model'\]\)"
    with pytest.raises(RuntimeError, match=match):
        load_weights(model, tmp_path / "epoch3.pt")


@pytest.mark.parametrize("value", ["text", 3, None, [1.0], torch.eye(3).to_sparse()])
def test_an_entry_that_is_no_dense_tensor_raises_and_changes_nothing(value, tmp_path):
    model = linear()
    before = weights(model)
    content = dict(model.state_dict())
    torch.save({name: tensor + 1 for name, tensor in content.items()} | {"bias": value}, tmp_path / "weights.pt")
    with pytest.raises((CheckpointError, ValueError), match=r"weights\.pt"):
        load_weights(model, tmp_path / "weights.pt")
    assert same(weights(model), before)
