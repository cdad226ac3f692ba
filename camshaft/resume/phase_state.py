"""What a checkpoint holds of a phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from camshaft.distributed.dtensors import distribute_like
from camshaft.models import load_plain_state_dict, plain_name, plain_state_dict, strip_wrapper_prefixes
from camshaft.protocols import PhaseLike
from camshaft.validation import join_names, stateful

__all__ = ["check_phase_state", "check_same_keys", "load_phase_state", "phase_state_dict", "sharding_reference"]

NOT_RESTORED = ("foreach", "fused", "capturable")
"""Settings of a parameter group that choose kernels; the present ones are kept."""

MAY_DIFFER = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "name", "param_names"}
"""Entries of a parameter group that schedulers or users add."""


def phase_state_dict(phase: PhaseLike) -> dict[str, Any]:
    """Everything of a phase that a checkpoint holds, including the gradients of an open window."""
    state: dict[str, Any] = {
        "module": plain_state_dict(phase.module),
        "optimizers": [optimizer.state_dict() for optimizer in phase.optimizers],
        "optimizer_step": phase.optimizer_step,
        "skipped_steps": phase.skipped_steps,
        "forward_passes": phase.forward_passes,
    }
    if phase.precision.scaler.is_enabled():
        state["scaler"] = phase.precision.state_dict()
    loss_module = stateful(phase.objective)
    if loss_module is not None:
        state["objective"] = dict(loss_module.state_dict())
    if phase.window_is_open:
        state["window"] = phase.window.state_dict() | phase.gradient_sync.window_state(phase)
    return state


def check_phase_state(phase: PhaseLike, state: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if a state belongs to another model or optimizer, and names what differs; changes nothing."""
    own = plain_state_dict(phase.module)
    check_same_keys(strip_wrapper_prefixes(state["module"], own), own, f"yours (phase {phase.name!r})")
    saved = state["optimizers"]
    if len(saved) != len(phase.optimizers):
        raise ValueError(f"the checkpoint has {len(saved)} optimizers, phase {phase.name!r} has {len(phase.optimizers)}")
    for optimizer_state, optimizer in zip(saved, phase.optimizers, strict=True):
        check_same_groups(optimizer_state, optimizer, phase.name)
    loss_module = stateful(phase.objective)
    if loss_module is not None and "objective" in state:
        check_same_keys(state["objective"], loss_module.state_dict(), f"the loss of phase {phase.name!r}")


def load_phase_state(phase: PhaseLike, state: Mapping[str, Any]) -> None:
    """Restores a state that :func:`check_phase_state` has accepted."""
    for optimizer_state, optimizer in zip(state["optimizers"], phase.optimizers, strict=True):
        load_optimizer(optimizer, optimizer_state)
    own = plain_state_dict(phase.module)
    saved = strip_wrapper_prefixes(state["module"], own)
    load_plain_state_dict(phase.module, {name: distribute_like(value, own[name]) for name, value in saved.items()})
    phase.precision.load_state_dict(state.get("scaler", {}))
    loss_module = stateful(phase.objective)
    if loss_module is not None and "objective" in state:
        loss_module.load_state_dict(state["objective"])
    phase.optimizer_step = state["optimizer_step"]
    phase.skipped_steps = state["skipped_steps"]
    phase.forward_passes = state["forward_passes"]
    phase.execution.invalidate(phase)
    load_window(phase, state.get("window"))


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Restores an optimizer, with its present choice of kernels."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {n: {key: distribute_like(v, parameters[n]) for key, v in state.items()} for n, state in saved["state"].items()}
    groups = []
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        groups.append({**saved_group, **{name: group[name] for name in NOT_RESTORED if name in group}})
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def load_window(phase: PhaseLike, window: Mapping[str, Any] | None) -> None:
    """Restores an open window with its gradients, or none."""
    phase.abandon_window()
    if window is None:
        return
    phase.window.load_state_dict(window)
    for parameter, gradient in zip(phase.parameters(), window["gradients"], strict=True):
        parameter.grad = None if gradient is None else distribute_like(gradient.to(parameter.device), parameter)


def sharding_reference(phase: PhaseLike, name: str) -> torch.Tensor | None:
    """The tensor whose sharding a tensor of :func:`phase_state_dict` has, by its path there, such as ``"module/0.weight"``."""
    part, *path = name.split("/")
    if part == "module":
        found: torch.Tensor | None = plain_state_dict(phase.module).get(plain_name("/".join(path)))
        return found
    if part == "optimizers" and path[1] == "state":
        groups = phase.optimizers[int(path[0])].param_groups
        parameters: list[torch.Tensor] = [p for group in groups for p in group["params"]]
        return parameters[int(path[2])]
    return phase.parameters()[int(path[1])] if part == "window" and path[0] == "gradients" else None


def check_same_keys(saved: Mapping[str, Any], own: Mapping[str, Any], model: str, source: str = "the checkpoint") -> None:
    """Raises ``ValueError`` if a checkpoint's tensors are not those of a model, and names those that differ.

    Args:
        saved: the tensors of the checkpoint.
        own: those of the model.
        model: what the message calls the model.
        source: what it calls the checkpoint.
    """
    shapes = [
        f"{key} ({tuple(saved[key].shape)} in the checkpoint, {tuple(own[key].shape)} here)"
        for key in saved
        if key in own and isinstance(saved[key], torch.Tensor) and saved[key].shape != own[key].shape
    ]
    differences = {
        "only the checkpoint has": [key for key in saved if key not in own],
        "only the model has": [key for key in own if key not in saved],
        "these have other shapes:": shapes,
    }
    found = [f"{text} {join_names(names, 6)}" for text, names in differences.items() if names]
    if found:
        raise ValueError(f"{source} was written for another model than {model}: {'; '.join(found)}")


def check_same_groups(saved: Mapping[str, Any], optimizer: Optimizer, phase: str) -> None:
    """Raises ``ValueError`` if a checkpoint's optimizer has other groups, or is of another kind, than this one."""
    kind = f"the {type(optimizer).__name__} of phase {phase!r}"
    before = [len(group["params"]) for group in saved["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if before != here:
        raise ValueError(f"the checkpoint's optimizer has parameter groups of {before} tensors, {kind} has {here}")
    for number, (old, new) in enumerate(zip(saved["param_groups"], optimizer.param_groups, strict=True)):
        differ = (set(old) ^ set(new)) - MAY_DIFFER
        if differ:
            names = ", ".join(sorted(differ))
            raise ValueError(f"the checkpoint's optimizer is of another kind than {kind}: group {number} differs in {names}")
