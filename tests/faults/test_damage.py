"""A damaged file is never loaded, and never passed over silently."""

import random
import shutil
import warnings

import pytest
import torch
from faulty import assert_of_one_step, counting_run, train

from camshaft import Events
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError, save_durably

NEWEST = "step-00000003.pt"


def scored_run(folder, **options):
    """A run whose score is best at step 2 of 3."""
    trainer, rotation = counting_run(folder, metric="score", keep_last=3, keep_best=1, **options)
    scores = {1: 0.1, 2: 0.9, 3: 0.5}

    @trainer.on(Events.ITERATION_COMPLETED)
    def score(engine):
        engine.state.metrics["score"] = scores[engine.state.iteration]

    return trainer, rotation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(scored_run(folder)[0], 3)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A folder with the checkpoints of three steps."""
    return shutil.copytree(trained, tmp_path / "run")


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def some_bits(content, number=200):
    return random.Random(0).sample(range(8 * len(content)), number)


def assert_falls_back(folder, reason, error=CheckpointError):
    """``resume("auto")`` takes step 2 and names the newest and why; asked for by its path, the newest raises."""
    trainer, rotation = scored_run(folder)
    with pytest.raises(error, match=f"{NEWEST}.*{reason}"):
        rotation.resume(folder / NEWEST)
    assert trainer.state.iteration == 0
    with pytest.warns(RuntimeWarning, match=f"passed over: .*{NEWEST}.*{reason}"):
        assert rotation.resume("auto") == folder / "step-00000002.pt"
    assert assert_of_one_step(trainer) == 2


@pytest.mark.parametrize("part", range(4))
def test_no_flipped_bit_loads(folder, part):
    complete = (folder / NEWEST).read_bytes()
    for bit in some_bits(complete)[part::4]:
        (folder / NEWEST).write_bytes(flipped(complete, bit))
        assert_falls_back(folder, "damaged|read")


@pytest.mark.parametrize("part", range(4))
def test_no_truncated_file_loads(folder, part):
    complete = (folder / NEWEST).read_bytes()
    for percent in range(part, 100, 4):
        (folder / NEWEST).write_bytes(complete[: len(complete) * percent // 100])
        assert_falls_back(folder, "damaged")


@pytest.mark.parametrize("cut", range(1, 34))
def test_no_file_without_its_last_bytes_loads(trained, tmp_path, cut):
    (tmp_path / NEWEST).write_bytes((trained / NEWEST).read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checked(tmp_path / NEWEST)


OTHER = {
    "empty": lambda complete: b"",
    "zeros": lambda complete: bytes(len(complete)),
    "zeros at the end": lambda complete: complete[: len(complete) // 2] + bytes(len(complete) - len(complete) // 2),
    "a page of zeros": lambda complete: complete[:4096] + bytes(512) + complete[4608:],
    "text": lambda complete: b"this is no checkpoint\n" * 50,
    "more at the end": lambda complete: complete + b"more",
    "more at the beginning": lambda complete: b"more" + complete,
    "two halves of two files": lambda complete: complete[: len(complete) // 2] + complete[: len(complete) // 2],
    "twice": lambda complete: complete + complete,
}


@pytest.mark.parametrize("name", OTHER)
def test_no_file_of_another_kind_loads(folder, name):
    (folder / NEWEST).write_bytes(OTHER[name]((folder / NEWEST).read_bytes()))
    assert_falls_back(folder, "damaged")


def test_a_file_without_a_checksum_does_not_load(folder):
    torch.save(load_checked(folder / NEWEST), folder / NEWEST)
    assert_falls_back(folder, "doesn't end with its checksum")


def test_a_missing_file_is_named(folder):
    (folder / NEWEST).unlink()
    assert_falls_back(folder, "does not exist", FileNotFoundError)


def test_a_folder_instead_of_a_file_is_named(folder):
    (folder / NEWEST).unlink()
    (folder / NEWEST).mkdir()
    assert_falls_back(folder, "is not a file")


def test_an_undamaged_file_of_something_else_is_named(folder):
    save_durably({"weights": torch.zeros(3)}, folder / NEWEST)
    assert_falls_back(folder, "is not a checkpoint")


def test_all_files_bad_is_an_error_that_names_each(folder):
    for path in folder.glob("step-*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*00000003.*00000002.*00000001"):
        scored_run(folder)[1].resume("auto")


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_all_files_bad_is_an_error_without_an_index_too(folder, index):
    for path in folder.glob("step-*.pt"):
        path.write_bytes(b"")
    if index == "lost":
        (folder / "checkpoints.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used"):
        scored_run(folder)[1].resume("auto")


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_a_folder_that_was_cleared_by_hand_starts_a_new_run(folder, index):
    for path in folder.glob("step-*.pt"):
        path.unlink()
    if index == "lost":
        (folder / "checkpoints.json").unlink()
    assert scored_run(folder)[1].resume("auto") is None


def damage(path):
    path.write_bytes(flipped(path.read_bytes(), 4000))


@pytest.mark.parametrize("harm", [damage, lambda path: path.unlink()], ids=["damaged", "missing"])
def test_the_best_never_falls_back(folder, harm):
    harm(folder / "step-00000002.pt")
    trainer, rotation = scored_run(folder)
    with pytest.raises(CheckpointError, match=r"step-00000002\.pt"):
        rotation.resume("best")
    assert trainer.state.iteration == 0


def test_a_bad_older_file_is_ignored(folder):
    damage(folder / "step-00000001.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scored_run(folder)[1].resume("auto") == folder / NEWEST


def test_training_continues_over_a_damaged_file(folder):
    damage(folder / NEWEST)
    trainer, rotation = counting_run(folder, keep_last=3)
    with pytest.warns(RuntimeWarning, match="passed over"):
        rotation.resume("auto")
    train(trainer, 5)
    trainer, rotation = counting_run(folder, keep_last=3)
    assert rotation.resume("auto") == folder / "step-00000005.pt"
    assert assert_of_one_step(trainer) == 5


# -- the index --------------------------------------------------------------------------------------------------------


def assert_is_found(folder):
    """The newest and the best checkpoint are the same as before."""
    trainer, rotation = scored_run(folder)
    assert rotation.best == folder / "step-00000002.pt"
    assert rotation.last == rotation.resume("auto") == folder / NEWEST
    assert assert_of_one_step(trainer) == 3


def test_no_flipped_bit_in_the_index_is_believed(folder):
    index = folder / "checkpoints.json"
    complete = index.read_bytes()
    for bit in some_bits(complete, 60):
        index.write_bytes(flipped(complete, bit))
        assert_is_found(folder)


INDICES = {
    "empty": b"",
    "zeros": bytes(500),
    "text": b"no index",
    "no mapping": b"[1, 2]",
    "another mapping": b'{"a": 1}',
    "entries of another kind": b'{"checkpoints": [3], "identity": "x", "crc32": 0}',
}


@pytest.mark.parametrize("name", INDICES)
def test_a_damaged_index_is_rebuilt(folder, name, caplog):
    (folder / "checkpoints.json").write_bytes(INDICES[name])
    assert_is_found(folder)
    assert "checkpoints.json is damaged" in caplog.text


def test_a_deleted_index_is_rebuilt(folder):
    (folder / "checkpoints.json").unlink()
    assert_is_found(folder)


def test_an_index_of_an_older_state_is_completed(folder):
    older = folder.parent / "older"
    train(scored_run(older)[0], 1)
    index = (older / "checkpoints.json").read_bytes()
    trainer, rotation = scored_run(older)
    rotation.resume("auto")
    train(trainer, 3)
    (older / "checkpoints.json").write_bytes(index)
    assert_is_found(older)


def test_a_rebuilt_index_rotates_as_before(folder):
    (folder / "checkpoints.json").unlink()
    trainer, rotation = counting_run(folder, keep_last=1, keep_best=1, metric="score")
    rotation.resume("auto")
    trainer.state.metrics["score"] = 0.3
    train(trainer, 5)
    assert sorted(path.name for path in folder.glob("*.pt")) == ["step-00000002.pt", "step-00000005.pt"]


def test_a_copy_under_another_name_is_left_alone(folder):
    shutil.copy(folder / "step-00000001.pt", folder / "step-00000000.pt")
    (folder / "checkpoints.json").unlink()
    trainer, rotation = counting_run(folder, keep_last=1)
    rotation.resume("auto")
    train(trainer, 5)
    assert sorted(path.name for path in folder.glob("*.pt")) == ["step-00000000.pt", "step-00000005.pt"]


def test_a_file_of_another_folder_is_left_alone_if_the_index_is_lost(folder, tmp_path):
    train(counting_run(tmp_path / "other")[0], 7)
    shutil.copy(tmp_path / "other" / "step-00000007.pt", folder)
    train_on(folder, NEWEST, 4)
    (folder / "checkpoints.json").unlink()
    train_on(folder, "step-00000004.pt", 5)
    assert sorted(path.name for path in folder.glob("*.pt")) == ["step-00000005.pt", "step-00000007.pt"]


def train_on(folder, name, steps):
    trainer, rotation = counting_run(folder, keep_last=1)
    rotation.resume(folder / name)
    train(trainer, steps)
