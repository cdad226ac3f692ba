"""What can be in a CUDA graph of the step, and what can't."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as optimizer_hooks

from camshaft.events import StepEvents
from camshaft.optimizers import takes_tensor_rate
from camshaft.pytree import is_strided
from camshaft.validation import join_names

if TYPE_CHECKING:
    from camshaft.engines.phase import Phase

__all__ = [
    "check_capturable",
    "check_device",
    "check_input",
    "check_leaves",
    "check_outside",
    "is_recordable",
    "known",
    "leaves_of",
    "settings_of",
]

INSIDE = (StepEvents.FORWARD_COMPLETED.name, StepEvents.BACKWARD_STARTED.name)


def check_outside(event: Any) -> None:
    """Raises where an event would fire inside a graph."""
    name = getattr(event, "name", event)
    if name in INSIDE:
        raise ValueError(
            f"{name} is inside the CUDA graph of capture=True, where no handler can run: listen to FORWARD_STARTED or "
            "BACKWARD_COMPLETED, or compute it in the model, loss_fn or compute_loss"
        )


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors whose gradient a loss makes."""
    found, seen, nodes = [], set(), [getattr(loss, "grad_fn", None)]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found


def check_leaves(leaves: list[torch.Tensor], phase: Phase) -> None:
    """Raises where gradients are made that no optimizer of the phase lets go of: a graph would write to them for ever."""
    held = {id(parameter) for parameter in phase.parameters()}
    names = {id(p): name for name, p in phase.module.named_parameters()}
    others = [names.get(id(t), f"a tensor of shape {tuple(t.shape)}") for t in leaves if id(t) not in held]
    if others:
        raise ValueError(
            f"capture=True: the loss also makes the gradients of {join_names(others, 3)}, which no optimizer of phase "
            f"{phase.name!r} trains. Freeze them with requires_grad_(False), or give them to the optimizer"
        )


def check_device(phase: Phase) -> None:
    """Raises where a model lies on more devices than its graphs would."""
    named = dict(phase.module.named_parameters())
    elsewhere = [name for name, p in named.items() if p.device != next(iter(named.values())).device]
    if elsewhere:
        raise ValueError(f"capture=True is for a model on one device, but {elsewhere[0]} is on {named[elsewhere[0]].device}")


def check_input(tensor: torch.Tensor, device: torch.device) -> None:
    """Raises where a tensor of a batch can't be copied into a graph."""
    shape = tuple(tensor.shape)
    if tensor.device.type != device.type:
        raise ValueError(
            f"capture=True needs the whole batch on {device}, but a tensor of shape {shape} is on {tensor.device}: the graph "
            "would keep its first values. Let prepare_batch move it"
        )
    if not is_strided(tensor):
        raise ValueError(
            f"capture=True: a batch has a sparse or nested tensor of shape {shape}, whose memory is another in each batch; pad "
            "it, or make it dense"
        )
    if tensor.grad_fn is not None:
        raise ValueError(
            f"capture=True: prepare_batch gives a tensor of shape {shape} with a gradient to be made of it, outside the graph. "
            "Do that in the model or in compute_loss"
        )


def check_capturable(optimizer: Optimizer) -> None:
    """Raises where an optimizer could be recorded, but wasn't made for it."""
    if any(group.get("capturable") is False for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise ValueError(f"capture=True needs an optimizer that can be captured: make it with {name}(..., capturable=True)")
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps do


def is_recordable(optimizer: Optimizer) -> bool:
    """Whether all that an optimizer does for a step is done by the device, and nobody listens in between."""
    hooks: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    hooks += [optimizer_hooks._global_optimizer_pre_hooks, optimizer_hooks._global_optimizer_post_hooks]
    on_device = type(optimizer) is SGD or all(group.get("capturable") for group in optimizer.param_groups)
    return on_device and not any(hooks)


def settings_of(optimizer: Optimizer) -> Hashable:
    """Whatever a recorded step knows of an optimizer's parameter groups."""
    apart = ("params", "param_names", "lr") if takes_tensor_rate(optimizer) else ("params", "param_names")
    groups = optimizer.param_groups
    return tuple((len(g["params"]), *[(name, known(value)) for name, value in g.items() if name not in apart]) for g in groups)


def known(setting: Any) -> Hashable:
    """What a graph keeps of a setting: of a tensor on its device the place, of anything else the value."""
    if isinstance(setting, torch.Tensor) and setting.device.type == "cpu":
        return tuple(setting.reshape(-1).tolist())
    return setting if isinstance(setting, Hashable) else repr(setting)
