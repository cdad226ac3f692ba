"""Whether models, inputs, optimizers and events can be part of a CUDA graph."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as optimizer_hooks

from camshaft.events import StepEvents
from camshaft.optimizers import supports_tensor_lr
from camshaft.protocols import PhaseLike
from camshaft.pytree import is_strided
from camshaft.validation import join_names

__all__ = [
    "captures_steps",
    "check_capturable",
    "check_input",
    "check_leaves",
    "check_outside",
    "check_single_device",
    "grads_are_none",
    "group_settings",
    "leaves_of",
    "setting_key",
]

INSIDE = (StepEvents.FORWARD_COMPLETED.name, StepEvents.BACKWARD_STARTED.name)


def check_outside(event: Any) -> None:
    """Raises ``ValueError`` if an event would fire inside a graph."""
    name = getattr(event, "name", event)
    if name in INSIDE:
        raise ValueError(
            f"{name} is inside the CUDA graph of capture=True, where no handler can run: listen to FORWARD_STARTED or "
            "BACKWARD_COMPLETED, or compute it in the model, loss_fn or compute_loss"
        )


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors for which the backward pass of a loss computes gradients."""
    found, seen, nodes = [], set(), [getattr(loss, "grad_fn", None)]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found


def check_leaves(leaves: list[torch.Tensor], phase: PhaseLike) -> None:
    """Raises ``ValueError`` if gradients are computed that no optimizer clears: a graph would add to them forever."""
    held = {id(parameter) for parameter in phase.parameters()}
    names = {id(p): name for name, p in phase.module.named_parameters()}
    others = [names.get(id(t), f"a tensor of shape {tuple(t.shape)}") for t in leaves if id(t) not in held]
    if others:
        raise ValueError(
            f"capture=True: the loss also computes gradients of {join_names(others, 3)}, which no optimizer of phase "
            f"{phase.name!r} trains. Freeze them with requires_grad_(False), or give them to the optimizer"
        )


def check_single_device(phase: PhaseLike) -> None:
    """Raises ``ValueError`` if a model is on more than one device."""
    named = dict(phase.module.named_parameters())
    elsewhere = [name for name, p in named.items() if p.device != next(iter(named.values())).device]
    if elsewhere:
        raise ValueError(f"capture=True is for a model on one device, but {elsewhere[0]} is on {named[elsewhere[0]].device}")


def check_input(tensor: torch.Tensor, device: torch.device) -> None:
    """Raises ``ValueError`` if a tensor of a batch can't be copied into a graph."""
    shape = tuple(tensor.shape)
    if tensor.device.type != device.type:
        raise ValueError(
            f"capture=True needs the whole batch on {device}, but a tensor of shape {shape} is on {tensor.device}: the graph "
            "would keep its first values. Let prepare_batch move it"
        )
    if not is_strided(tensor):
        raise ValueError(
            f"capture=True: a batch has a sparse or nested tensor of shape {shape}, whose memory layout varies; pad it, or "
            "make it dense"
        )
    if tensor.grad_fn is not None:
        raise ValueError(
            f"capture=True: prepare_batch returns a tensor of shape {shape} with an autograd graph, outside the CUDA graph. "
            "Do that in the model or in compute_loss"
        )


def check_capturable(optimizer: Optimizer) -> None:
    """Raises ``ValueError`` if an optimizer could be captured, but was made without ``capturable=True``."""
    if any(group.get("capturable") is False for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise ValueError(f"capture=True needs an optimizer that can be captured: make it with {name}(..., capturable=True)")
    optimizer._warned_capturable_if_run_uncaptured = True  # the warm-up steps run uncaptured


def is_capturable(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer runs on the device alone, without hooks."""
    hooks: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    hooks += [optimizer_hooks._global_optimizer_pre_hooks, optimizer_hooks._global_optimizer_post_hooks]
    on_device = type(optimizer) is SGD or all(group.get("capturable") for group in optimizer.param_groups)
    return on_device and not any(hooks)


def captures_steps(phase: PhaseLike) -> bool:
    """Whether the step of every optimizer of a phase can be captured."""
    return all(is_capturable(optimizer) for optimizer in phase.optimizers)


def grads_are_none(phase: PhaseLike) -> bool:
    """Whether no handler has set a gradient before the window's first pass."""
    return phase.has_own_zero_grad or all(p.grad is None for p in phase.parameters())


def group_settings(optimizer: Optimizer) -> Hashable:
    """The settings of an optimizer's parameter groups that a captured step depends on."""
    excluded = ("params", "param_names", "lr") if supports_tensor_lr(optimizer) else ("params", "param_names")
    return tuple(
        (len(group["params"]), *[setting_key(value) for name, value in group.items() if name not in excluded])
        for group in optimizer.param_groups
    )


def setting_key(setting: Any) -> Hashable:
    """What a graph captures of a setting: the identity of a tensor on its device, the value of anything else."""
    if setting is None or isinstance(setting, (bool, int, float)):  # the usual case, on the hot path
        return setting
    if isinstance(setting, torch.Tensor) and setting.device.type == "cpu":
        return tuple(setting.reshape(-1).tolist())
    return setting if isinstance(setting, Hashable) else repr(setting)
