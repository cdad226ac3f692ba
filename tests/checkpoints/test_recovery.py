"""Sharded checkpoints that have only a temporary name, because a process was killed while it replaced them."""

import os
import shutil

import pytest
from toys import batches, trainer_of

from camshaft import CheckpointRotation
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import MANIFEST, remove, save_durably
from camshaft.checkpoints.recovery import complete_copies, recover

NAME = "step-00000002"
NEW, OLD = f".camshaft-{NAME}.0000aaaa.tmp", f".camshaft-{NAME}.0000bbbb.old.tmp"


@pytest.fixture
def folder(tmp_path):
    """A folder in which step 2 was being replaced: the copy that was saved later is the new one."""
    trainer = trainer_of()
    with CheckpointRotation(tmp_path / "run", sharded=True).attached(trainer) as checkpoints:
        trainer.run(batches(2))
        shutil.copytree(checkpoints.last, tmp_path / "old")
        os.replace(checkpoints.save(), tmp_path / "run" / NEW)
    os.replace(tmp_path / "old", tmp_path / "run" / OLD)
    return tmp_path / "run"


def number_of(path):
    return load_checked(path / MANIFEST)["rotation"]["entry"]["written"]


def set_number(path, number):
    manifest = load_checked(path / MANIFEST)
    manifest["rotation"]["entry"]["written"] = number
    save_durably(manifest, path / MANIFEST)


def test_of_two_complete_copies_the_later_save_is_recovered(folder):
    assert complete_copies(folder) == {NAME: folder / NEW}
    recover(folder)
    assert number_of(folder / NAME) == 2
    assert complete_copies(folder) == {}


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "no part", "half a part", "no metadata"])
def test_if_the_new_copy_is_incomplete_the_old_one_is_recovered(folder, damage):
    victim = folder / NEW / {"manifest": MANIFEST, "part": "__0_0.distcp", "metadata": ".metadata"}[damage.split()[-1]]
    if damage.startswith("no"):
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size // 2)
    recover(folder)
    assert number_of(folder / NAME) == 1


def test_if_both_are_incomplete_nothing_is_recovered(folder):
    for name in (OLD, NEW):
        (folder / name / MANIFEST).unlink()
    recover(folder)
    assert not (folder / NAME).exists()


def test_a_checkpoint_that_has_its_name_is_not_replaced(folder):
    os.replace(folder / OLD, folder / NAME)
    assert complete_copies(folder) == {}
    recover(folder)
    assert number_of(folder / NAME) == 1


def test_a_copy_that_a_failed_save_has_left_is_older_than_the_one_being_replaced(folder):
    set_number(folder / OLD, 5)
    recover(folder)
    assert number_of(folder / NAME) == 5


def test_the_names_of_earlier_versions_are_recovered(folder):
    os.replace(folder / NEW, folder / f".camshaft-{NAME}.tmp")
    os.replace(folder / OLD, folder / f".camshaft-{NAME}.old.tmp")
    for name, number in (
        (f".camshaft-{NAME}.tmp", 10**18),
        (f".camshaft-{NAME}.old.tmp", 10**18 + 1),
    ):  # a clock that went back
        set_number(folder / name, number)
    recover(folder)
    assert number_of(folder / NAME) == 10**18


@pytest.mark.parametrize(
    "name",
    [
        f".camshaft-{NAME}.0000aaaa.removed.tmp",
        f".camshaft-{NAME}.pt.0000aaaa.tmp",
        ".camshaft-step-2.0000aaaa.tmp",
        ".camshaft-step-000000002.0000aaaa.tmp",
        ".camshaft-notes.0000aaaa.tmp",
        f".camshaft-{NAME}.0000aaaa",
        f"{NAME}.0000aaaa.tmp",
    ],
)
def test_nothing_else_is_recovered(folder, name):
    shutil.rmtree(folder / OLD)
    os.replace(folder / NEW, folder / name)
    assert complete_copies(folder) == {}


def test_a_checkpoint_that_was_being_deleted_is_not_recovered(folder, monkeypatch):
    recover(folder)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)
    remove(folder / NAME)
    assert not (folder / NAME).exists()
    assert NAME not in complete_copies(folder) or complete_copies(folder)[NAME].name == OLD


def test_attach_recovers_and_then_clears_the_folder(folder):
    trainer = trainer_of()
    checkpoints = CheckpointRotation(folder, sharded=True).attach(trainer)
    assert checkpoints.last == checkpoints.resume() == folder / NAME
    assert sorted(path.name for path in folder.iterdir()) == [".camshaft.lock", "checkpoints.json", NAME]
    trainer.run(batches(2), max_epochs=2)
    assert sorted(path.name for path in folder.glob("step-*")) == [NAME, "step-00000004"]


def test_a_reader_finds_it_under_its_temporary_name(folder):
    trainer, reader = trainer_of(), CheckpointRotation(folder)
    assert reader.last == reader.resume("auto", trainer) == folder / NEW
    assert trainer.state.optimizer_step == 2
    assert sorted(path.name for path in folder.glob(".camshaft-step*")) == [NEW, OLD]
