"""Synchronizes the gradients of a phase between ranks, once per optimizer step. A single process does nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ReduceOp

from camshaft.distributed.collectives import (
    all_gather_object,
    all_reduce,
    all_reduce_max,
    all_reduce_mean,
    rank,
    world_size,
)
from camshaft.distributed.dtensors import is_dtensor
from camshaft.models import ddp_wrapper, fsdp_modules
from camshaft.protocols import PhaseLike

__all__ = ["ReplicatedGradients", "SingleProcess", "check_wrapped"]


class SingleProcess:
    """Gradient synchronization of a single process: there is nothing to do."""

    def before_forward(self, phase: PhaseLike, engine: Any) -> None:
        """Does nothing."""

    def reduce(self, phase: PhaseLike) -> None:
        """Does nothing."""

    def normalizer(self, phase: PhaseLike) -> Any:
        """The number by which the accumulated gradients must be divided; ``None`` for 1."""
        return phase.window.divisor()

    def max_over_ranks(self, flags: torch.Tensor, overflows: list[torch.Tensor]) -> torch.Tensor:
        """The flags as they are."""
        return flags

    def after_step(self, phase: PhaseLike) -> None:
        """Does nothing."""

    def check_weights(self, phase: PhaseLike) -> None:
        """Does nothing."""

    def window_state(self, phase: PhaseLike) -> dict[str, Any]:
        """The gradients of an open window."""
        return {"gradients": [p.grad for p in phase.parameters()]}

    def discard(self, phase: PhaseLike) -> None:
        """Does nothing."""

    def must_finish_window(self) -> bool:
        """Never: gradients can be saved at any time."""
        return False

    def restore(self) -> None:
        """Does nothing."""


class ReplicatedGradients(SingleProcess):
    """Gradient synchronization of a phase that several ranks train.

    The batches of a window run forward and backward without communication, except the last one: DDP or FSDP2 reduces the
    gradients during its backward pass. If it was not known to be the last one, or the network is called without its DDP wrapper
    (as in a GAN), the gradients are reduced explicitly when the window is full.

    Args:
        phase: the phase.

    Raises:
        RuntimeError: if the network is not wrapped for several processes.
    """

    def __init__(self, phase: PhaseLike) -> None:
        check_wrapped(phase)
        self.wrapper = None if phase.reduced_by_hand else ddp_wrapper(phase.module)
        self.sharded_modules = fsdp_modules(phase.module)
        self.is_waiting = False
        """Whether gradients have been accumulated that are not reduced yet."""
        self.weights_are_checked = False
        """Whether the weights of all ranks have been compared since the run began."""
        self._reduced_by_wrapper = {id(p) for p in self._wrapped_parameters()}

    def _wrapped_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters whose gradients DDP or FSDP2 reduces; those of a loss function are not among them."""
        if self.wrapper is not None:
            return list(self.wrapper.parameters())
        return [p for module in self.sharded_modules for p in module.parameters() if is_dtensor(p)]

    def _parameters_to_reduce(self, phase: PhaseLike) -> list[torch.nn.Parameter]:
        """The parameters whose gradients must be reduced explicitly when the window is full."""
        trained = [p for p in phase.parameters() if p.requires_grad]
        if self.is_waiting and not self.sharded_modules:
            return trained
        return [p for p in trained if id(p) not in self._reduced_by_wrapper]

    def before_forward(self, phase: PhaseLike, engine: Any) -> None:
        """Sets whether the backward pass of the next batch reduces gradients."""
        window = phase.window
        is_last = window.batches + 1 == window.length
        if self.sharded_modules:  # FSDP2 cannot reduce later what a backward pass has not reduced
            end_is_known = engine.length_is_known or phase is not engine.primary
            reduces = is_last or not end_is_known or window.will_be_dropped
            for module in self.sharded_modules:
                module.set_requires_gradient_sync(reduces)
            self.is_waiting = not reduces
        elif self.wrapper is not None:
            self.wrapper.require_backward_grad_sync = is_last
            self.is_waiting = not is_last
        else:
            self.is_waiting = True

    def reduce(self, phase: PhaseLike) -> None:
        """Reduces the gradients of a full window that the backward passes have not reduced.

        Raises:
            RuntimeError: if FSDP2 can no longer reduce them.
        """
        if self.must_finish_window():
            raise RuntimeError(
                "the data ended inside a window, earlier than its length says: FSDP2 can no longer reduce the window's "
                "gradients. Give run() an epoch_length that is not longer than the data"
            )
        parameters = self._parameters_to_reduce(phase)
        self.is_waiting = False
        for parameter, gradient in zip(parameters, mean_gradients(parameters), strict=True):
            parameter.grad = gradient

    def normalizer(self, phase: PhaseLike) -> Any:
        """The number by which the mean gradients must be divided; ``None`` for 1.

        Raises:
            ValueError: if every batch on every rank has weight 0.
        """
        divisor = phase.window.divisor(is_only_process=False)
        if phase.window.loss_weight == "batch":
            return divisor
        mean = self._mean_weight(phase, divisor)
        if mean.device.type == "cpu" and not mean:
            raise ValueError("every batch of this window weighs 0 by loss_weight on every rank: its mean loss is not defined")
        return mean

    def _mean_weight(self, phase: PhaseLike, weight: Any) -> torch.Tensor:
        total = torch.as_tensor(weight, dtype=torch.float64, device=phase.device).clone()
        all_reduce(total)
        return total / world_size()

    def max_over_ranks(self, flags: torch.Tensor, overflows: list[torch.Tensor]) -> torch.Tensor:
        """The maximum of each flag over all ranks; the scaler's overflows, which are the last flags, are updated."""
        all_reduce(flags, ReduceOp.MAX)
        for overflow, flag in zip(overflows, flags[len(flags) - len(overflows) :], strict=True):
            overflow.copy_(flag)
        return flags

    def after_step(self, phase: PhaseLike) -> None:
        """Compares the weights of all ranks after the first optimizer step of a run."""
        if not self.weights_are_checked:
            self.check_weights(phase)

    def check_weights(self, phase: PhaseLike) -> None:
        """Compares weights and learning rates of all ranks.

        Raises:
            RuntimeError: if they differ.
        """
        self.weights_are_checked = True
        sums = [p.detach().double().sum() for p in phase.parameters() if not is_dtensor(p)]
        lrs = [float(group["lr"]) for optimizer in phase.optimizers for group in optimizer.param_groups]
        of_all_ranks = all_gather_object((torch.stack(sums).tolist() if sums else [], lrs))
        weights, lr = of_all_ranks[0]
        for other, (its_weights, its_lr) in enumerate(of_all_ranks):
            if not are_close(its_lr, lr):
                raise RuntimeError(
                    f"the learning rates of phase {phase.name!r} differ: {lr} on rank 0, {its_lr} on rank {other}. A "
                    "schedule follows a number that differs between ranks; give it a metric that is computed over all of them"
                )
            if not are_close(its_weights, weights):
                raise RuntimeError(
                    f"the weights of phase {phase.name!r} differ between rank 0 and rank {other} after an optimizer step: "
                    "their gradients were not reduced, or the ranks began with different weights. Call the wrapped model, not "
                    "its .module, in the objective; load weights, and unfreeze what will be trained, before you wrap it"
                )

    def window_state(self, phase: PhaseLike) -> dict[str, Any]:
        """The mean over all ranks of the gradients of an open window, from which any rank can continue.

        Raises:
            RuntimeError: if FSDP2 has gradients that are not reduced; they can't be read then.
        """
        if self.must_finish_window():
            raise RuntimeError(
                "a checkpoint can't be written inside this window: FSDP2 has gradients of it that have not been reduced. "
                "Save at the window's end: CheckpointRotation and terminate() wait for it"
            )
        parameters = self._parameters_to_reduce(phase)
        means = {id(p): mean for p, mean in zip(parameters, mean_gradients(parameters, copy=True), strict=True)}
        gradients = [means.get(id(p), None if p.grad is None else p.grad.detach().clone()) for p in phase.parameters()]
        if phase.window.loss_weight == "batch":
            return {"gradients": gradients}
        return {"gradients": gradients, "weight": float(self._mean_weight(phase, phase.window.weight))}

    def discard(self, phase: PhaseLike) -> None:
        """Clears gradients that have not been reduced; FSDP2 keeps them in buffers of its own."""
        for module in self.sharded_modules:
            clear_unreduced_gradients(module)
        self.is_waiting = False

    def must_finish_window(self) -> bool:
        """Whether the open window has gradients that FSDP2 can only reduce with the window's last batch."""
        return self.is_waiting and bool(self.sharded_modules)

    def restore(self) -> None:
        """Makes every backward pass reduce its gradients again, as before the run."""
        for module in self.sharded_modules:
            module.set_requires_gradient_sync(True)
        if self.wrapper is not None:
            self.wrapper.require_backward_grad_sync = True


def mean_gradients(parameters: list[torch.nn.Parameter], copy: bool = False) -> list[torch.Tensor | None]:
    """The mean of each parameter's gradient over all ranks; a rank without a gradient counts as zeros.

    Args:
        parameters: the same ones, in the same order, on every rank.
        copy: leaves the gradients themselves unchanged.

    Returns:
        The means; ``None`` for a parameter without a gradient on any rank.
    """
    if not parameters:
        return []
    on_any_rank = all_reduce_max([p.grad is not None for p in parameters])
    found = [
        None if not exists else torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() if copy else p.grad
        for p, exists in zip(parameters, on_any_rank, strict=True)
    ]
    all_reduce_mean(gradient for gradient in found if gradient is not None)
    return found


def clear_unreduced_gradients(sharded_module: Any) -> None:
    """Clears what FSDP2 has accumulated in backward passes without reduction; it has no public method for that."""
    for module in sharded_module.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for parameter in (parameter for group in groups if group is not None for parameter in group.fsdp_params):
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # does not exist before the first forward pass
                parameter._unsharded_param.grad = None


def are_close(first: list[float], second: list[float]) -> bool:
    """Whether two lists of numbers are equal to rounding; NaN equals NaN."""
    return len(first) == len(second) and all(map(is_close, first, second))


def is_close(one: float, other: float) -> bool:
    """Whether two numbers are equal to rounding."""
    return one == other or (one != one and other != other) or abs(one - other) <= 1e-6 * max(abs(one), abs(other), 1.0)


def check_wrapped(phase: PhaseLike) -> None:
    """Checks that DDP or FSDP2 wraps a network that several ranks train.

    Raises:
        RuntimeError: if it does not; says how to wrap the network.
    """
    if ddp_wrapper(phase.module) is not None or fsdp_modules(phase.module):
        return
    if any(is_dtensor(p) for p in phase.module.parameters()):
        raise RuntimeError(
            f"the model of phase {phase.name!r} is sharded (tensor parallelism) without fully_shard, so that it is unknown "
            "which ranks get the same batch. Apply fully_shard(model) over its data-parallel dimension"
        )
    raise RuntimeError(
        f"{world_size()} processes train, but the model of phase {phase.name!r} is not wrapped: each would train its own "
        f"model (this is rank {rank()}). Wrap it before you make the optimizer: model = ignite.distributed.auto_model(model), "
        "DistributedDataParallel(model) or fully_shard(model)"
    )
