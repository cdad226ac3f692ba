"""One phase on several processes: its gradients travel once per optimizer step, and weights are summed over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ReduceOp

from camshaft.distributed.collectives import all_gather_object, all_reduce, all_reduce_max, all_reduce_mean, rank, world_size
from camshaft.distributed.dtensors import is_dtensor
from camshaft.models import ddp_wrapper, fsdp_modules

if TYPE_CHECKING:
    from camshaft.engines.phase import Phase

__all__ = ["Replicas", "check_wrapped"]


class Replicas:
    """What a phase does where other processes train the same network.

    The batches of a window go forward and backward without a word to the others; with the last one the gradients are
    reduced, by DDP or FSDP2 as they do it best. Where the window's end could not be foreseen, and where a network is called
    past its DDP wrapper (in a GAN), they are reduced by hand when it closes.

    Args:
        phase: the phase.
    """

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.wrapper = None if phase.reduced_by_hand else ddp_wrapper(phase.module)
        self.shards = fsdp_modules(phase.module)
        self.waiting = False
        """Whether gradients have been gathered that have not travelled yet."""
        self.checked = False
        """Whether the processes have been seen to have the same weights after a step."""
        self._travel_by_themselves = {id(p) for p in self._wrapped()}

    def _wrapped(self) -> list[torch.nn.Parameter]:
        """The parameters whose gradients DDP or FSDP2 reduces; a loss with parameters of its own has others."""
        if self.wrapper is not None:
            return list(self.wrapper.parameters())
        return [p for part in self.shards for p in part.parameters() if is_dtensor(p)]

    def _parameters_to_reduce(self) -> list[torch.nn.Parameter]:
        """Those that have to be reduced by hand when the window closes."""
        trained = [p for p in self.phase.parameters() if p.requires_grad]
        if self.waiting and not self.shards:
            return trained
        return [p for p in trained if id(p) not in self._travel_by_themselves]

    def announce(self, foreseen: bool) -> None:
        """Says before a forward pass whether its gradients are to travel.

        Args:
            foreseen: whether the number of the window's batches is sure.
        """
        window = self.phase.window
        last = window.is_single_batch or window.batches + 1 == window.length
        if self.shards:
            travels = last or not foreseen or window.will_be_dropped  # later it would be too late, or they would be left behind
            for part in self.shards:
                part.set_requires_gradient_sync(travels)
            self.waiting = not travels
        elif self.wrapper is not None:
            self.wrapper.require_backward_grad_sync = last
            self.waiting = not last
        else:
            self.waiting = True

    def reduce(self) -> None:
        """Brings the window's gradients together, where that hasn't happened on the way.

        Raises:
            RuntimeError: where FSDP2 can't do it any more.
        """
        if self.waiting and self.shards:
            raise RuntimeError(
                "the data ended inside a window, sooner than its length had said: FSDP2 can't reduce the window's gradients "
                "any more. Give run() an epoch_length that the data has"
            )
        parameters = self._parameters_to_reduce()
        self.waiting = False
        for parameter, gradient in zip(parameters, brought_together(parameters), strict=True):
            parameter.grad = gradient

    def forget(self) -> None:
        """Throws away what has not travelled; FSDP2 keeps that for itself."""
        for part in self.shards:
            forget_gradients(part)
        self.waiting = False

    def leave(self) -> None:
        """Has gradients travel with every backward pass again, for whatever comes after the run."""
        for part in self.shards:
            part.set_requires_gradient_sync(True)
        if self.wrapper is not None:
            self.wrapper.require_backward_grad_sync = True

    def divisor(self, weight: Any) -> torch.Tensor:
        """What mean gradients are divided by, so that each process's weights count: the mean weight of the processes.

        Args:
            weight: the sum of the weights that this process's window has gathered.

        Raises:
            ValueError: where every batch on every process weighs nothing.
        """
        total = self._mean_weight(weight)
        if total.device.type == "cpu" and not total:
            raise ValueError("every batch of this window weighs 0 by loss_weight on every process: its mean is not defined")
        return total

    def _mean_weight(self, weight: Any) -> torch.Tensor:
        total = torch.as_tensor(weight, dtype=torch.float64, device=self.phase.device).clone()
        all_reduce(total)
        return total / world_size()

    def gathered(self) -> dict[str, Any]:
        """What an open window has gathered, on the average of the processes: from there, any of them can go on.

        Raises:
            RuntimeError: where FSDP2 has gradients that have not travelled; they can't be had then.
        """
        if self.waiting and self.shards:
            raise RuntimeError(
                "a checkpoint can't be written inside this window: FSDP2 has gradients of it that have not been reduced. "
                "Save at the window's end: CheckpointRotation and terminate() wait for it"
            )
        parameters = self._parameters_to_reduce()
        together = {id(p): gradient for p, gradient in zip(parameters, brought_together(parameters, copy=True), strict=True)}
        gradients = [together.get(id(p), None if p.grad is None else p.grad.detach().clone()) for p in self.phase.parameters()]
        if self.phase.window.loss_weight == "batch":
            return {"gradients": gradients}
        return {"gradients": gradients, "weight": float(self._mean_weight(self.phase.window.weight))}

    def worst(self, verdicts: torch.Tensor, overflows: list[torch.Tensor]) -> torch.Tensor:
        """Each verdict on the coming step as the strictest process has it; the scaler hears of it too."""
        all_reduce(verdicts, ReduceOp.MAX)
        for found, verdict in zip(overflows, verdicts[len(verdicts) - len(overflows) :], strict=True):
            found.copy_(verdict)
        return verdicts

    def check_same(self) -> None:
        """Sees after the first step of a run, and after each epoch, that every process has the same weights and rates.

        Raises:
            RuntimeError: where it hasn't.
        """
        self.checked = True
        sums = [p.detach().double().sum() for p in self.phase.parameters() if not is_dtensor(p)]
        rates = [float(group["lr"]) for optimizer in self.phase.optimizers for group in optimizer.param_groups]
        prints = all_gather_object((torch.stack(sums).tolist() if sums else [], rates))
        weights, lr = prints[0]
        for other, (its_weights, its_lr) in enumerate(prints):
            if not _same(its_lr, lr):
                raise RuntimeError(
                    f"the learning rates of phase {self.phase.name!r} differ: {lr} on rank 0, {its_lr} on rank {other}. A "
                    "schedule follows a number that isn't the same on every process; give it a metric over all of them"
                )
            if not _same(its_weights, weights):
                raise RuntimeError(
                    f"the weights of phase {self.phase.name!r} differ between rank 0 and rank {other} after an optimizer step: "
                    "their gradients have not travelled, or the processes began with other weights. Call the wrapped model, "
                    "and not its .module, in the objective; load weights, and unfreeze what will be trained, before you wrap it"
                )


def brought_together(parameters: list[torch.nn.Parameter], copy: bool = False) -> list[torch.Tensor | None]:
    """The gradients of parameters, on the average of the processes; zeros count where a process has none.

    Args:
        parameters: the same ones, in the same order, on every process.
        copy: leaves the gradients themselves as they are.
    """
    if not parameters:
        return []
    somewhere = all_reduce_max([p.grad is not None for p in parameters])
    found = [
        None if not there else torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() if copy else p.grad
        for p, there in zip(parameters, somewhere, strict=True)
    ]
    all_reduce_mean(gradient for gradient in found if gradient is not None)
    return found


def forget_gradients(part: Any) -> None:
    """Clears what FSDP2 has gathered in backward passes whose gradients didn't travel; it has no method for that."""
    for module in part.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for parameter in (parameter for group in groups if group is not None for parameter in group.fsdp_params):
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # not before the first forward pass
                parameter._unsharded_param.grad = None


def _same(ones: list[float], others: list[float]) -> bool:
    return len(ones) == len(others) and all(_equal(one, other) for one, other in zip(ones, others, strict=True))


def _equal(one: float, other: float) -> bool:
    return one == other or (one != one and other != other) or abs(one - other) <= 1e-6 * max(abs(one), abs(other), 1.0)


def check_wrapped(phase: Phase) -> None:
    """Raises where a network is trained by several processes that don't know of each other.

    Raises:
        RuntimeError: says how to wrap it.
    """
    if ddp_wrapper(phase.module) is not None or fsdp_modules(phase.module):
        return
    if any(is_dtensor(p) for p in phase.module.parameters()):
        raise RuntimeError(
            f"the model of phase {phase.name!r} is split over the processes (tensor parallelism) without fully_shard: which of "
            "them see the same batch isn't known then. Apply fully_shard(model) over the data-parallel dimension of its mesh"
        )
    raise RuntimeError(
        f"{world_size()} processes train, but the model of phase {phase.name!r} is wrapped for one: each would go its own way "
        f"(this is rank {rank()}). Wrap it before you make the optimizer: model = ignite.distributed.auto_model(model), "
        "DistributedDataParallel(model) or fully_shard(model)"
    )
