"""Checkpoints that are folders are read and verified as files are."""

import pytest
from runs_on_disk import flip, truncate
from toys import batches, trainer_of

from camshaft import CheckpointRotation, LRHistory
from camshaft.cli.integrity import check_folder
from camshaft.cli.run import read_run


@pytest.fixture
def folder(tmp_path):
    """A folder of sharded checkpoints, of step 3 and step 6."""
    trainer = trainer_of()
    LRHistory().attach(trainer)
    CheckpointRotation(tmp_path, sharded=True).attach(trainer)
    trainer.run(batches(3), max_epochs=2)
    return tmp_path


def bad(folder):
    return {verdict.file: verdict.reason for verdict in check_folder(folder).bad}


def test_a_sharded_run_is_read(folder):
    run = read_run(folder)
    assert [one.file for one in run.checkpoints] == ["step-00000003", "step-00000006"]
    assert run.learning_rates == {"lr": [(step, 0.1) for step in range(1, 7)]}
    assert (run.ending.reason, run.warnings) == ("finished after 2 epochs", ())


def test_its_size_is_that_of_all_its_parts(folder):
    parts = sum(part.stat().st_size for part in (folder / "step-00000006").iterdir())
    assert read_run(folder).checkpoints[-1].size == parts > 0


def test_whole_folders_are_good(folder):
    assert [verdict.file for verdict in check_folder(folder).files][1:] == ["step-00000003", "step-00000006"]
    assert bad(folder) == {}


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("part", ["__0_0.distcp", ".metadata", "checkpoint.pt"])
def test_a_damaged_part_makes_it_bad(part, damage, folder):
    damage(folder / "step-00000006" / part)
    assert list(bad(folder)) == ["step-00000006"]
    assert read_run(folder).learning_rates == {"lr": [(1, 0.1), (2, 0.1), (3, 0.1)]}


def test_a_part_that_is_gone_is_named(folder):
    (folder / "step-00000006" / "__0_0.distcp").unlink()
    assert bad(folder) == {"step-00000006": "is damaged: __0_0.distcp does not exist"}


def test_without_an_index_the_folders_are_unlisted(folder):
    (folder / "checkpoints.json").unlink()
    assert [(verdict.good, verdict.listed) for verdict in check_folder(folder).files] == [(True, False), (True, False)]
