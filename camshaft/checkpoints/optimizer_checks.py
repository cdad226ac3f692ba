"""Whether the optimizers in a checkpoint have settings and states of the kinds that those of a trainer need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from camshaft.checkpoints.files import CheckpointError

__all__ = ["check_optimizers"]

OTHER_SHAPES = ("LBFGS", "Adafactor", "Muon")
"""The optimizers of torch whose state has other shapes than the parameters."""

SCALAR_STATES = ("step", "mu_product", "eta", "mu")
OPTIONAL_STATES = ("momentum_buffer",)

ADAM = ("step", "exp_avg", "exp_avg_sq")

NEEDED_STATES = {
    "Adadelta": ("step", "square_avg", "acc_delta"),
    "Adagrad": ("step", "sum"),
    "Adam": ADAM,
    "AdamW": ADAM,
    "Adamax": ("step", "exp_avg", "exp_inf"),
    "ASGD": ("step", "eta", "mu", "ax"),
    "NAdam": (*ADAM, "mu_product"),
    "RAdam": ADAM,
    "RMSprop": ("step", "square_avg"),
    "Rprop": ("step", "prev", "step_size"),
    "SparseAdam": ADAM,
}
"""What each optimizer of torch reads in its step from a state that is not empty."""

NEEDED_WITH = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
"""What it also reads if a setting is on."""


def check_optimizers(phases: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Checks the optimizers of each phase that a trainer and a checkpoint have; others are reported when it is restored.

    Args:
        phases: the phases of the trainer.
        content: the content of the checkpoint.

    Raises:
        CheckpointError: names the field.
    """
    for name in phases.keys() & content["phases"].keys():
        saved = content["phases"][name]["optimizers"]
        for number, (state, optimizer) in enumerate(zip(saved, phases[name].optimizers, strict=False)):
            field = f"phases[{name!r}].optimizers[{number}]"
            check_settings(state["param_groups"], optimizer, field)
            if type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ not in OTHER_SHAPES:
                check_states(state["state"], optimizer, field)
                check_needed(state, type(optimizer).__name__, field)


def check_settings(saved: list[dict[str, Any]], optimizer: Optimizer, field: str) -> None:
    """Each setting of a group must be of the kind of the present one."""
    for number, (group, own) in enumerate(zip(saved, optimizer.param_groups, strict=False)):
        for key in group.keys() & own.keys() - {"params"}:
            if not is_alike(group[key], own[key]):
                raise CheckpointError(f"{field}.param_groups[{number}][{key!r}] must be like {own[key]!r:.60}")


def is_alike(saved: Any, own: Any) -> bool:
    """Whether a saved setting can take the place of the present one."""
    if own is None:
        return saved is None or isinstance(saved, (bool, int, float, str))
    if isinstance(own, bool):
        return isinstance(saved, bool) or saved is None
    if isinstance(own, (int, float, torch.Tensor)):
        return is_number(saved)
    if isinstance(own, (tuple, list)):
        same = isinstance(saved, (tuple, list)) and len(saved) == len(own)
        return same and all(is_alike(one, other) for one, other in zip(saved, own, strict=True))
    return isinstance(saved, type(own))


def is_number(value: Any) -> bool:
    """Whether a value is a number that a kernel can take, or a tensor with one."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def is_step(key: str, value: Any) -> bool:
    """Whether a number of steps is at least 0; other numbers may be anything."""
    return key != "step" or float(value) >= 0


def check_states(saved: Mapping[int, Any], optimizer: Optimizer, field: str) -> None:
    """Each state of a parameter must be a number, or a tensor of the parameter's shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in saved.items():
        shape = parameters[number].shape if number < len(parameters) else None
        for key, value in state.items():
            shaped = isinstance(value, torch.Tensor) and value.shape == shape and value.layout is torch.strided
            if not (
                shaped
                or (key in SCALAR_STATES and is_number(value) and is_step(key, value))
                or (value is None and key in OPTIONAL_STATES)
            ):
                raise CheckpointError(
                    f"{field}.state[{number}][{key!r:.60}] must be a tensor of the shape {tuple(shape or ())}"
                )


def check_needed(saved: Mapping[str, Any], kind: str, field: str) -> None:
    """Each state must hold what the optimizer's step reads; an empty one is filled by the first step."""
    if kind not in NEEDED_STATES:
        return
    for group in saved["param_groups"]:
        switched = [state for setting, state in NEEDED_WITH.items() if group.get(setting)]
        for number in group["params"]:
            state = saved["state"].get(number)
            missing = [key for key in (*NEEDED_STATES[kind], *switched) if state and key not in state]
            if missing:
                raise CheckpointError(f"{field}.state[{number}] lacks {missing[0]!r}, which {kind} needs")
