"""What a checkpoint may carry: tensors and plain values."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

__all__ = ["pack"]


def pack(value: Any, path: str) -> Any:
    """Converts a value to tensors and plain values, which ``torch.load(weights_only=True)`` can read.

    Raises:
        TypeError: if a value cannot be converted; names its path.
    """
    if value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, np.generic):
        return pack(value.item(), path)
    if type(value) in (list, tuple, set, torch.Size):
        kind = tuple if isinstance(value, torch.Size) else type(value)
        return kind(pack(item, f"{path}[{i}]") for i, item in enumerate(value))
    if type(value) in (dict, OrderedDict, Counter):
        return type(value)({pack(key, f"{path}'s keys"): pack(item, f"{path}[{key!r}]") for key, item in value.items()})
    if hasattr(value, "state_dict"):
        return pack(dict(value.state_dict()), path)
    raise TypeError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint can't carry safely; "
        "use tensors, numbers, text, lists and dicts of them, or an object with state_dict()"
    )
