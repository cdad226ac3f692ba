"""Weights alone, in a file."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from camshaft.engines.checks import check_same_keys
from camshaft.files import BadFile, load_checked, save_durably
from camshaft.modules import fitted, unwrap

__all__ = ["load_weights", "save_weights"]


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes a model's weights and buffers, under names without the prefixes of DataParallel, DDP and ``torch.compile``.

    The file replaces an older one atomically, and any ``torch.load(path, weights_only=True)`` reads it.

    Args:
        model: any module.
        path: the file; its folder is made where it isn't there.

    Returns:
        The path.

    Raises:
        OSError: where it can't be written.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> path = save_weights(model, tempfile.mkdtemp() + "/linear.pt")
        >>> load_weights(model, path)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_durably(dict(unwrap(model).state_dict()), path)
    return path


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads weights into a model, wrapped or not; a trainer's checkpoint will do, too, and gives its first phase's model.

    Args:
        model: the module; its parameters stay on their device.
        path: a file from :func:`save_weights`, ``torch.save(model.state_dict())`` or a checkpoint.

    Raises:
        RuntimeError: where the file isn't there, is damaged or holds more than tensors and plain values.
        ValueError: where it is of another model; the text names the keys that differ.

    Example:
        >>> import tempfile
        >>> path = save_weights(nn.Linear(3, 2), tempfile.mkdtemp() + "/linear.pt")
        >>> load_weights(nn.DataParallel(nn.Linear(3, 2)), path)
    """
    path = Path(path)
    content = load_checked(path, sealed=False)
    if isinstance(content, dict) and "phases" in content:
        content = next(iter(content["phases"].values()))["module"]
    if not isinstance(content, dict):
        raise BadFile(f"{path} holds a {type(content).__name__}, not a state dict")
    inner = unwrap(model)
    saved = fitted(content, inner.state_dict())
    check_same_keys(saved, inner.state_dict(), f"this {type(inner).__name__}")
    inner.load_state_dict(saved)
