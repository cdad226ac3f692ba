"""Checkpoint files: checksums, atomic writes, damage and temporary files."""

import os

import pytest
import torch
from toys import linear, same, weights

from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError, remove_temporary_files, save_durably, write_durably


def test_saved_content_is_loaded(tmp_path):
    content = {"weights": weights(linear()), "numbers": [1, 2.5, None, True], "text": "a"}
    size = save_durably(content, tmp_path / "file.pt")
    found = load_checked(tmp_path / "file.pt")
    assert same(found.pop("weights"), content.pop("weights"))
    assert found == content
    assert size == (tmp_path / "file.pt").stat().st_size


def test_torch_load_reads_a_file_with_a_checksum(tmp_path):
    save_durably({"a": torch.arange(3)}, tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt", weights_only=True)["a"].tolist() == [0, 1, 2]


def test_a_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "file.pt"
    save_durably([1], path)
    good = path.read_bytes()
    for position in range(0, len(good), 13):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match=r"file\.pt"):
            load_checked(path)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_durably(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_durably(tmp_path / "file", lambda file: file.write(b"text"))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_file_without_a_checksum_is_loaded_only_if_allowed(tmp_path):
    torch.save([1], tmp_path / "file.pt")
    assert load_checked(tmp_path / "file.pt", sealed=False) == [1]
    with pytest.raises(CheckpointError, match="doesn't end with its checksum"):
        load_checked(tmp_path / "file.pt")


def test_loading_a_folder_or_a_missing_file_raises(tmp_path):
    with pytest.raises(CheckpointError, match="is not a file"):
        load_checked(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checked(tmp_path / "nothing.pt")


def test_only_temporary_files_are_removed(tmp_path):
    for name in (".camshaft-1.tmp", ".camshaft-2.tmp", "file.tmp", "step-00000001.pt"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.tmp", "step-00000001.pt"]
