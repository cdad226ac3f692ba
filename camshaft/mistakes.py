"""What an error says of the value that came, and of many names."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

__all__ = ["came", "listed"]


def came(value: Any) -> str:
    """What came, by its kind; of a class, also how to make an object of it.

    Example:
        >>> came("adam")
        'str'
        >>> from ignite.metrics import Accuracy, Loss
        >>> came(Accuracy), came(Loss)
        ('the class Accuracy; make one: Accuracy()', 'the class Loss; make one: Loss(...)')
    """
    if not isinstance(value, type):
        return type(value).__name__
    try:
        inspect.signature(value).bind()
        arguments = ""
    except (TypeError, ValueError):
        arguments = "..."
    return f"the class {value.__name__}; make one: {value.__name__}({arguments})"


def listed(names: Sequence[str], most: int) -> str:
    """Some names in a row, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
