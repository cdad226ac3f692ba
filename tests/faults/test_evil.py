"""A checkpoint that holds code runs none of it, wherever it is."""

import os
import pickle
import zipfile

import pytest
from faulty import counting_run, train

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError, save_durably


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def paths_in(value, path=()):
    """The path of each entry of a nest, at any depth."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from paths_in(item, (*path, key))


def replaced(value, path, evil):
    """A copy of a nest with one entry replaced."""
    if not path:
        return evil
    if isinstance(value, dict):
        return {key: replaced(item, path[1:], evil) if key == path[0] else item for key, item in value.items()}
    return type(value)(replaced(item, path[1:], evil) if n == path[0] else item for n, item in enumerate(value))


@pytest.fixture
def saved(tmp_path):
    train(counting_run(tmp_path / "run")[0], 1)
    return tmp_path / "run" / "step-00000001.pt"


def test_the_payload_works_if_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_nothing_runs_in_place_of_any_entry(saved, tmp_path):
    content, marker = load_checked(saved), tmp_path / "ran"
    tried = list(paths_in(content))
    assert {path[0] for path in tried} == set(content)
    assert max(map(len, tried)) >= 5
    for path in tried:
        save_durably(replaced(content, path, Evil(marker)), saved)
        trainer, rotation = counting_run(saved.parent)
        with pytest.raises(
            CheckpointError, match=r"step-00000001\.pt holds more than tensors and plain values, and was not loaded"
        ):
            rotation.resume(saved)
        assert not marker.exists(), f"the code in {path} ran"
        assert trainer.state.iteration == 0


def test_nothing_runs_in_place_of_a_key(saved, tmp_path):
    save_durably(load_checked(saved) | {Evil(tmp_path / "ran"): 1}, saved)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        counting_run(saved.parent)[1].resume(saved)
    assert not (tmp_path / "ran").exists()


def test_nothing_runs_if_the_file_is_a_pickle(saved, tmp_path):
    saved.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        counting_run(saved.parent)[1].resume(saved)
    assert not (tmp_path / "ran").exists()


def test_nothing_runs_if_the_pickle_inside_is_replaced(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        entries, comment = {name: archive.read(name) for name in archive.namelist()}, archive.comment
    with zipfile.ZipFile(saved, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickle.dumps(Evil(tmp_path / "ran")) if name.endswith("data.pkl") else content)
        archive.comment = comment
    with pytest.raises(CheckpointError, match="don't match its checksum"):
        counting_run(saved.parent)[1].resume(saved)
    assert not (tmp_path / "ran").exists()


def test_nothing_runs_if_the_index_is_rebuilt(saved, tmp_path):
    save_durably(load_checked(saved) | {"rotation": Evil(tmp_path / "ran")}, saved)
    (saved.parent / "checkpoints.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used: .*holds more than tensors"):
        counting_run(saved.parent)[1].resume("auto")
    assert not (tmp_path / "ran").exists()
