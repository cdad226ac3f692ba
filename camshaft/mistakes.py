"""What an error says of a value that came in place of another."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["came"]


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
