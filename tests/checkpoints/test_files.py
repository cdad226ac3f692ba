"""Checkpoint files: checksums, atomic writes, damage and temporary files."""

import os

import pytest
import torch
from toys import linear, same, weights

from camshaft.checkpoints.files import CheckpointError, load_checked, remove_temporary_files, save_durably, write_durably


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
