"""Validation of arguments, and the texts of errors."""

from __future__ import annotations

import inspect
import logging
import math
import operator
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from camshaft.models import device_of, plain_named_parameters
from camshaft.pytree import describe

__all__ = [
    "add_note",
    "as_integer",
    "bad_loss",
    "check_choice",
    "check_count",
    "check_device",
    "check_no_class",
    "check_non_negative",
    "check_optimizers",
    "check_optional_count",
    "check_positive",
    "check_prepare",
    "describe_type",
    "join_names",
    "name_of",
    "no_gradients",
    "stateful",
]


def describe_type(value: Any) -> str:
    """The type of a value, for an error message; for a class also how to make an object of it.

    Example:
        >>> describe_type("adam")
        'str'
        >>> from ignite.metrics import Accuracy, Loss
        >>> describe_type(Accuracy), describe_type(Loss)
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


def join_names(names: Sequence[str], most: int) -> str:
    """Joins names, and says how many more there are.

    Example:
        >>> join_names(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


logger = logging.getLogger("camshaft")


def name_of(function: Any) -> str:
    """The name of a user's function in error messages: that of its class if it is an object."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__qualname__", None) or type(function).__name__


def as_integer(value: Any) -> int | None:
    """An integer of Python, NumPy or torch as Python's; ``None`` for anything else, including a bool."""
    try:
        return None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        return None


def check_count(value: Any, argument: str, minimum: int = 1) -> int:
    """An integer of at least ``minimum``; accepts whatever has ``__index__``, such as NumPy's integers.

    Raises:
        ValueError: if it is anything else.
    """
    number = as_integer(value)
    if number is None or number < minimum:
        allowed = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
        raise ValueError(f"{argument} must be {allowed}, got {value!r}")
    return number


def check_optional_count(value: Any, argument: str, minimum: int = 1) -> int | None:
    """``None``, or what :func:`check_count` returns."""
    return None if value is None else check_count(value, argument, minimum)


def as_float(value: Any) -> float:
    """A number of Python or NumPy as a ``float``; NaN for anything else, including a bool."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def check_positive(value: Any, argument: str) -> float:
    """A number above 0, of Python or NumPy, as Python's; infinity is allowed.

    Raises:
        ValueError: if it is anything else.
    """
    number = as_float(value)
    if not number > 0:
        raise ValueError(f"{argument} must be a positive number, got {value!r}")
    return number


def check_non_negative(value: Any, argument: str) -> float:
    """A finite number of at least 0, of Python or NumPy, as Python's.

    Raises:
        ValueError: if it is anything else.
    """
    number = as_float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{argument} must be a finite number of at least 0, got {value!r}")
    return number


def check_choice(value: Any, argument: str, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` if a value is not one of some words.

    Example:
        >>> check_choice("mean", "mode", ("min", "max"))
        Traceback (most recent call last):
        ValueError: mode must be 'min' or 'max', got 'mean'
    """
    if not isinstance(value, str) or value not in choices:
        *first, last = map(repr, choices)
        raise ValueError(f"{argument} must be {', '.join(first)} or {last}, got {value!r}")


def check_no_class(value: Any, argument: str, what: str, kind: type = object) -> None:
    """Raises ``TypeError`` if the value is a class instead of an object.

    Args:
        value: the value.
        argument: the name of the argument.
        what: what is allowed, for the message.
        kind: only classes of this kind are refused; others may be called like a function, as ``tuple`` can.
    """
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{argument} must be {what}, got {describe_type(value)}")


def check_prepare(function: Any) -> None:
    """Raises ``TypeError`` if ``prepare_batch`` can't be called with its arguments."""
    if not callable(function):
        raise TypeError(f"prepare_batch must be callable, got {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function written in C may have no signature
        return
    try:
        signature.bind(None, device=None, non_blocking=True)
    except TypeError:
        raise TypeError(
            f"prepare_batch is called as prepare_batch(batch, device=..., non_blocking=...), but {name_of(function)} takes "
            f"{signature}; write def prepare_batch(batch, device, non_blocking)"
        ) from None


def check_device(device: torch.device | str | None, module: nn.Module) -> torch.device:
    """The device of the batches; raises ``ValueError`` if the model is on another one."""
    found = device_of(module)
    if device is None:
        return found
    wanted = torch.device(device)
    for existing in [parameter.device for parameter in module.parameters()] or [found]:
        if existing.type == wanted.type and wanted.index in (None, existing.index):
            return existing
    raise ValueError(
        f"device is {str(wanted)!r} but the model is on {str(found)!r}; call model.to({str(wanted)!r}) before you make "
        "the optimizer, or leave device out"
    )


def check_optimizers(optimizer: Any, module: nn.Module, extra: nn.Module | None, phase: str) -> tuple[Optimizer, ...]:
    """Validates the optimizers of a phase.

    Args:
        optimizer: an optimizer or a sequence of them.
        module: the network.
        extra: a loss with parameters of its own, if there is one.
        phase: the phase's name, for the message.
    """
    optimizers = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    if not optimizers:
        raise ValueError("optimizer must be an optimizer or a sequence of at least one, got an empty one")
    known = {id(p) for part in (module, extra) if part is not None for p in part.parameters()}
    taken: set[int] = set()
    for item in optimizers:
        if not isinstance(item, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a sequence of them, got {describe_type(item)}")
        if isinstance(item, torch.optim.LBFGS):
            raise TypeError(
                "optimizer LBFGS is not supported: it evaluates the loss several times per step, but each batch is run once"
            )
        kind = f"the optimizer {type(item).__name__} of phase {phase!r}"
        held = {id(p) for group in item.param_groups for p in group["params"]}
        if not held:
            raise ValueError(f"{kind} holds no parameters")
        if not held & known:
            raise ValueError(
                f"{kind} holds no parameter of the model: it was made for another model, or before the model was "
                "replaced; make it from model.parameters()"
            )
        if held & taken:
            raise ValueError(f"{kind} holds parameters that another optimizer holds too: they would be updated twice")
        taken |= held
    left_out = [name for name, p in plain_named_parameters(module).items() if p.requires_grad and id(p) not in taken]
    if left_out:
        names = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        logger.warning(
            "%d parameters of phase %r require gradients but are in no optimizer, so that they will never be trained: %s. "
            "Make the optimizer after the last change of the model, or freeze them: camshaft.freeze(model, ...)",
            len(left_out), phase, names,
        )  # fmt: skip
    return optimizers


def stateful(objective: Any) -> nn.Module | None:
    """The loss function of an objective if it is a module with a state (weights of its own), otherwise ``None``."""
    loss_fn = objective.loss_fn
    return loss_fn if isinstance(loss_fn, nn.Module) and loss_fn.state_dict() else None


def bad_loss(loss: Any, source: str) -> Exception:
    """The error for a loss whose backward pass can't run."""
    if not isinstance(loss, torch.Tensor):
        return TypeError(f"{source} must be a scalar tensor, got {'None' if loss is None else describe(loss)}")
    if loss.numel() != 1:
        return ValueError(f"{source} must be a scalar, got {describe(loss)}; take its mean() or sum()")
    return ValueError(
        f"{source} has no gradient: it does not depend on any trainable parameter. Was it computed under no_grad() "
        "or detached, or is everything frozen?"
    )


def no_gradients(source: str) -> RuntimeError:
    """The error for a loss whose backward pass has computed no gradient of a parameter of the optimizer."""
    return RuntimeError(
        f"{source} trains nothing: after its backward pass no parameter of the optimizer has a gradient. Compute it from the "
        "model that the optimizer was made for"
    )


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an exception, once. Python 3.10 keeps it but does not print it."""
    notes = getattr(error, "__notes__", [])
    if note not in notes:
        vars(error)["__notes__"] = [*notes, note]
