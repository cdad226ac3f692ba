"""What a checkpoint must contain: the keys that a trainer restores, with their types and ranges, in one table."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from camshaft.checkpoints.files import CheckpointError
from camshaft.checkpoints.text import printable
from camshaft.rng import decode_numpy, decode_python

__all__ = ["check_content"]

Check = Callable[[Any, str], None]
"""Checks a value; the text is the path of its field."""


def check_content(content: Any, path: Path | str) -> None:
    """Checks everything of a checkpoint that a trainer will restore, before it is used.

    What handlers, metrics and data loaders have saved is their own and is checked when they load it.

    Args:
        content: the content of a checkpoint, with its tensors.
        path: the checkpoint, for the error.

    Raises:
        CheckpointError: names the file, the field, and what is allowed.
    """
    if not isinstance(content, dict) or "phases" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of a trainer")
    try:
        CONTENT(content, "")
        _check_data(content["data"], "data")
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be used: {printable(str(error))}") from error


def fail(field: str, allowed: str, value: Any) -> CheckpointError:
    """The error for a field."""
    shown = repr(value)[:60] if isinstance(value, (int, float, str, type(None))) else f"a {type(value).__name__}"
    return CheckpointError(f"{field or 'the content'} must be {allowed}, got {shown}")


def integer(least: int = 0, most: int = 2**63 - 1) -> Check:
    """An integer of at least ``least``."""

    def check(value: Any, field: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise fail(field, f"an integer of at least {least}", value)

    return check


def number(value: Any, field: str) -> None:
    """A number, or a tensor that holds one."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fail(field, "a number", value)


def finite(value: Any, field: str) -> None:
    """A finite number of at least 0."""
    number(value, field)
    if isinstance(value, torch.Tensor) and value.is_meta:  # it has not been read yet
        return
    if isinstance(value, torch.Tensor) and value.is_complex():
        raise fail(field, "a real number", value)
    if not 0 <= float(value) < math.inf:
        raise fail(field, "a finite number of at least 0", value)


def scalar(value: Any, field: str) -> None:
    """A number or any tensor."""
    if not isinstance(value, (int, float, torch.Tensor)):
        raise fail(field, "a number or a tensor", value)


def tensor(value: Any, field: str) -> None:
    """A tensor."""
    if not isinstance(value, torch.Tensor):
        raise fail(field, "a tensor", value)


def of(kind: type, allowed: str) -> Check:
    """A value of a type."""

    def check(value: Any, field: str) -> None:
        if not isinstance(value, kind):
            raise fail(field, allowed, value)

    return check


def optional(check: Check) -> Check:
    """``None``, or what another check allows."""
    return lambda value, field: None if value is None else check(value, field)


def listing(check: Check, least: int = 0) -> Check:
    """A list of values that another check allows."""

    def check_all(value: Any, field: str) -> None:
        if not isinstance(value, (list, tuple)) or len(value) < least:
            raise fail(field, "a list" if not least else "a list that is not empty", value)
        for position, item in enumerate(value):
            check(item, f"{field}[{position}]")

    return check_all


def mapping(check: Check, keys: type = str, least: int = 0, *, names: bool = False) -> Check:
    """A dict of values that another check allows, whose keys have a type; those that are ``names`` must be printable."""

    def check_all(value: Any, field: str) -> None:
        if not isinstance(value, dict) or len(value) < least:
            raise fail(field, "a dict" if not least else "a dict that is not empty", value)
        for key, item in value.items():
            if type(key) is not keys:
                raise fail(f"each key of {field}", f"of the type {keys.__name__}", key)
            if names and not str(key).isprintable():
                raise fail(f"each key of {field}", "printable", key)
            check(item, f"{field}[{str(key)[:80]!r}]")

    return check_all


def record(required: Mapping[str, Check], may_have: Mapping[str, Check] | None = None) -> Check:
    """A dict with these keys. Others are ignored, so that a later version can add some."""

    def check(value: Any, field: str) -> None:
        if not isinstance(value, dict):
            raise fail(field, "a dict", value)
        start = f"{field}." if field else ""
        for name, part in required.items():
            if name not in value:
                raise CheckpointError(f"{start}{name} is missing")
            part(value[name], f"{start}{name}")
        for name, part in (may_have or {}).items():
            if name in value:
                part(value[name], f"{start}{name}")

    return check


def anything(value: Any, field: str) -> None:
    """Any value."""


# -- random generators ------------------------------------------------------------------------------------------------


def _accepted(use: Callable[[Any], Any], what: str) -> Check:
    """A state that a new generator accepts."""

    def check(value: Any, field: str) -> None:
        try:
            use(value)
        except Exception as error:
            raise fail(field, what, value) from error

    return check


def _use_python(state: Any) -> None:
    version, words, gauss = state
    if len(words) != 625 or not (gauss is None or isinstance(gauss, float)):
        raise ValueError("not the state of Python's generator")
    random.Random().setstate(decode_python([version, words, gauss]))


def _use_torch(state: Any) -> None:
    if not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8 or state.dim() != 1:
        raise ValueError("not the state of a generator of torch")
    if state.numel() > 16:  # a CUDA generator's has 16 bytes
        torch.Generator().set_state(state.cpu())


def _use_numpy(state: Any) -> None:
    """The state of the global generator, or of a ``RandomState`` or ``Generator`` of any kind of bit generator."""
    if isinstance(state, list):
        keys, position, has_gauss, cached = state
        if len(keys) != 624 or not 0 <= position <= 624 or has_gauss not in (0, 1) or not math.isfinite(cached):
            raise ValueError("not the state of NumPy's generator")
        np.random.RandomState().set_state(decode_numpy(state))
        return
    _check_arrays(state)
    generator = getattr(np.random, state["bit_generator"])
    if not issubclass(generator, np.random.BitGenerator):
        raise ValueError("not a kind of generator")
    generator().state = decode_numpy(state)


def _check_arrays(state: Any) -> None:
    """Arrays inside a state: their dtype decides how much memory they take."""
    if isinstance(state, Mapping):
        if set(state) == {"values", "dtype"} and state["dtype"] not in ("uint32", "uint64"):
            raise ValueError("not an array of a generator's state")
        for value in state.values():
            _check_arrays(value)


def _use_own(state: Any) -> None:
    """The state of a generator that belongs to a data loader, of any of the kinds."""
    if isinstance(state, torch.Tensor):
        _use_torch(state)
    elif isinstance(state, dict):
        _use_numpy(state)
    else:
        _use_python(state)


TORCH_RNG = _accepted(_use_torch, "the state of a generator of torch")
RNG = record(
    {
        "python": _accepted(_use_python, "the state of Python's generator"),
        "numpy": _accepted(_use_numpy, "the state of NumPy's generator"),
        "torch": TORCH_RNG,
    },
    {"cuda": listing(TORCH_RNG)},
)
OWN_GENERATORS = listing(_accepted(_use_own, "the state of a random generator"))

# -- the table --------------------------------------------------------------------------------------------------------

COUNT = integer(0)
BOOL = of(bool, "True or False")
TEXT = of(str, "a text")
DICT = of(dict, "a dict")

CLOCKS = record(
    {
        "iteration": COUNT,
        "epoch": COUNT,
        "epoch_length": optional(integer(1)),
        "max_epochs": optional(COUNT),
        "max_iters": optional(COUNT),
        "epoch_is_open": BOOL,
        "epoch_iteration": COUNT,
        "length_is_learned": BOOL,
    },
    {"stop_reason": optional(TEXT)},
)

GROUP = record({"params": listing(COUNT)}, {"lr": number})
STATES = mapping(mapping(anything), keys=int)


def optimizer(value: Any, field: str) -> None:
    """The state of an optimizer, of which each entry belongs to a parameter."""
    record({"state": STATES, "param_groups": listing(GROUP)})(value, field)
    parameters = sum(len(group["params"]) for group in value["param_groups"])
    for key in value["state"]:
        integer(0, parameters - 1)(key, f"each key of {field}.state")


SCALER = record({}, {"scale": finite, "growth_factor": finite, "backoff_factor": finite, "growth_interval": COUNT})
WINDOW = record(
    {"batches": COUNT, "length": optional(integer(1)), "weight": finite, "gradients": listing(optional(tensor))},
)
PHASE = record(
    {
        "module": mapping(anything, names=True),
        "optimizers": listing(optimizer),
        "optimizer_step": COUNT,
        "skipped_steps": COUNT,
        "forward_passes": COUNT,
    },
    {"scaler": SCALER, "objective": mapping(anything), "window": WINDOW},
)

DATA = record(
    {"length": optional(COUNT), "spent": BOOL, "own": OWN_GENERATORS},
    {
        "taken": COUNT,
        "start": record({"rng": RNG, "own": OWN_GENERATORS, "epochs": listing(COUNT), "warm": BOOL}),
        "dealt": listing(COUNT),
        "ahead": record({"rng": optional(RNG), "own": OWN_GENERATORS}),
        "loader": DICT,
    },
)

RANK: dict[str, Check] = {
    "handlers": mapping(anything),
    "losses": mapping(scalar),
    "batch": anything,
    "epoch_metrics": mapping(optional(DICT)),
    "rng": RNG,
    "data": DATA,
}
"""What each rank has of its own."""


def rank(value: Any, field: str) -> None:
    """The part of a rank."""
    record(RANK)(value, field)
    _check_data(value["data"], f"{field}.data")


CONTENT = record(
    {"format": integer(0), "clocks": CLOCKS, "phases": mapping(PHASE, least=1, names=True), "metrics": mapping(scalar), **RANK},
    {"ranks": listing(rank, least=1), "rotation": record({"identity": TEXT, "entry": DICT})},
)


def _check_data(data: Mapping[str, Any], field: str) -> None:
    """The position in the data: that of an unfinished pass has its start, and is inside of it."""
    if data["spent"]:
        return
    if "start" not in data or "taken" not in data:
        raise CheckpointError(f"{field} is not complete: start and taken are missing")
    if data["length"] is not None and data["taken"] > data["length"]:
        raise fail(f"{field}.taken", f"at most the length of the data, {data['length']}", data["taken"])
