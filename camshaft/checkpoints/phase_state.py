"""What a checkpoint holds of a phase, and how it goes on from that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from camshaft.distributed.dtensors import distribute_like
from camshaft.models import unwrap
from camshaft.validation import join_names, stateful

if TYPE_CHECKING:
    from camshaft.engines.phase import Phase

__all__ = ["check_same_keys", "check_state", "load_state", "sharding_reference", "state_of"]


def state_of(phase: Phase) -> dict[str, Any]:
    """Everything of this phase that a checkpoint holds; an open window brings its gradients."""
    state: dict[str, Any] = {
        "module": dict(unwrap(phase.module).state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in phase.optimizers],
        "optimizer_step": phase.optimizer_step,
        "skipped_steps": phase.skipped_steps,
        "forward_passes": phase.forward_passes,
    }
    if phase.scaler is not None:
        state["scaler"] = phase.scaler.state_dict()
    part = stateful(phase.objective)
    if part is not None:
        state["objective"] = dict(part.state_dict())
    if phase.window_is_open:
        gathered: dict[str, Any] = {"gradients": [p.grad for p in phase.parameters()]}
        if phase.replicas is not None:
            gathered = phase.replicas.gathered()
        state["window"] = phase.window.state_dict() | gathered
    return state


def check_state(phase: Phase, state: Mapping[str, Any]) -> None:
    """Raises where a state belongs to another model or optimizer; changes nothing.

    Raises:
        ValueError: names the keys or groups that differ.
    """
    check_same_keys(state["module"], unwrap(phase.module).state_dict(), f"yours (phase {phase.name!r})")
    saved = state["optimizers"]
    if len(saved) != len(phase.optimizers):
        raise ValueError(f"the checkpoint has {len(saved)} optimizers, phase {phase.name!r} has {len(phase.optimizers)}")
    for old, optimizer in zip(saved, phase.optimizers, strict=True):
        check_same_groups(old, optimizer, phase.name)


def sharding_reference(phase: Phase, name: str) -> torch.Tensor | None:
    """What a tensor of :func:`state_of` is sharded as, by its place there, such as ``"module/0.weight"``."""
    part, *place = name.split("/")
    if part == "module":
        found: torch.Tensor | None = unwrap(phase.module).state_dict().get("/".join(place))
        return found
    if part == "optimizers" and place[1] == "state":
        held: list[torch.Tensor] = [p for group in phase.optimizers[int(place[0])].param_groups for p in group["params"]]
        return held[int(place[2])]
    return phase.parameters()[int(place[1])] if part == "window" and place[0] == "gradients" else None


def load_state(phase: Phase, state: Mapping[str, Any]) -> None:
    """Restores what :func:`state_of` gave and :func:`check_state` has found fitting."""
    own = unwrap(phase.module).state_dict()
    unwrap(phase.module).load_state_dict({name: distribute_like(value, own[name]) for name, value in state["module"].items()})
    for saved, optimizer in zip(state["optimizers"], phase.optimizers, strict=True):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        parts = {n: {name: distribute_like(v, held[n]) for name, v in part.items()} for n, part in saved["state"].items()}
        groups = [with_kernels_of(*pair) for pair in zip(saved["param_groups"], optimizer.param_groups, strict=True)]
        optimizer.load_state_dict({"state": parts, "param_groups": groups})
    if phase.scaler is not None and "scaler" in state:
        phase.scaler.load_state_dict(state["scaler"])
    part = stateful(phase.objective)
    if part is not None and "objective" in state:
        part.load_state_dict(state["objective"])
    phase.optimizer_step = state["optimizer_step"]
    phase.skipped_steps = state["skipped_steps"]
    phase.forward_passes = state["forward_passes"]
    if phase.capture is not None:
        phase.capture.forget()
    load_window(phase, state.get("window"))


def load_window(phase: Phase, window: Mapping[str, Any] | None) -> None:
    """Goes on with a window that was open, or with none."""
    phase.window.reset()
    if phase.replicas is not None:
        phase.replicas.forget()
    phase.zero_grad()
    if window is None:
        return
    phase.window.load_state_dict(window)
    for parameter, gradient in zip(phase.parameters(), window["gradients"], strict=True):
        parameter.grad = None if gradient is None else distribute_like(gradient.to(parameter.device), parameter)


def with_kernels_of(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's parameter group with the present choice of kernels: they are no part of what has been learned."""
    return {**saved, **{name: group[name] for name in ("foreach", "fused", "capturable") if name in group}}


def check_same_keys(saved: Mapping[str, Any], own: Mapping[str, Any], model: str, source: str = "the checkpoint") -> None:
    """Raises ``ValueError`` where a checkpoint's tensors aren't those of this model, and names the ones that differ.

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
    """Raises ``ValueError`` where a checkpoint's optimizer has other groups, or is of another kind, than this one."""
    kind = f"the {type(optimizer).__name__} of phase {phase!r}"
    before = [len(group["params"]) for group in saved["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if before != here:
        raise ValueError(f"the checkpoint's optimizer has parameter groups of {before} tensors, {kind} has {here}")
    scheduled = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "name", "param_names"}
    for number, (old, new) in enumerate(zip(saved["param_groups"], optimizer.param_groups, strict=True)):
        differ = (set(old) ^ set(new)) - scheduled
        if differ:
            names = ", ".join(sorted(differ))
            raise ValueError(f"the checkpoint's optimizer is of another kind than {kind}: group {number} differs in {names}")
