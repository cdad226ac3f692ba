"""One phase on several processes: its gradients travel once per optimizer step, and weights are summed over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from camshaft.distributed import agreed, average, everyones, local, rank, replica, shards, world_size

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
        self.wrapper = None if phase.reduced_by_hand else replica(phase.module)
        self.shards = shards(phase.module)
        self.waiting = False
        """Whether gradients have been gathered that have not travelled yet."""
        self.checked = bool(self.shards)
        """Whether the processes have been seen to have the same weights after a step."""

    def announce(self, foreseen: bool) -> None:
        """Says before a forward pass whether its gradients are to travel.

        Args:
            foreseen: whether the number of the window's batches is sure.
        """
        window = self.phase.window
        last = window.plain or window.batches + 1 == window.length
        if self.shards:
            travels = last or not foreseen or window.is_doomed  # later it would be too late, or they would be left behind
            for part in self.shards:
                part.set_requires_gradient_sync(travels)
            self.waiting = not travels
        elif self.wrapper is not None:
            self.wrapper.require_backward_grad_sync = last
            self.waiting = not last
        else:
            self.waiting = True

    def reduce(self) -> None:
        """Brings the window's gradients together, where that hasn't happened on the way."""
        if not self.waiting or self.shards:
            return
        self.waiting = False
        parameters = [p for p in self.phase.parameters() if p.requires_grad]
        has_gradient = agreed([p.grad is not None for p in parameters])
        for parameter, anywhere in zip(parameters, has_gradient, strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        average(p.grad for p in parameters if p.grad is not None)

    def divisor(self, weight: Any) -> torch.Tensor:
        """What mean gradients are divided by, so that each process's weights count: the mean weight of the processes.

        Args:
            weight: the sum of the weights that this process's window has gathered.

        Raises:
            ValueError: where every batch on every process weighs nothing.
        """
        total = torch.as_tensor(weight, dtype=torch.float64, device=self.phase.device).clone()
        dist.all_reduce(total)
        if total.device.type == "cpu" and not total:
            raise ValueError("every batch of this window weighs 0 by loss_weight on every process: its mean is not defined")
        return total / world_size()

    def gathered(self) -> dict[str, Any]:
        """What an open window has gathered, on the average of the processes: from there, any of them can go on."""
        gradients = [None if p.grad is None else p.grad.detach().clone() for p in self.phase.parameters()]
        if self.waiting:
            average(gradient for gradient in gradients if gradient is not None)
        if self.phase.window.loss_weight == "batch":
            return {"gradients": gradients}
        return {"gradients": gradients, "weight": float(self.divisor(self.phase.window.weight))}

    def worst(self, verdicts: torch.Tensor, overflows: list[torch.Tensor]) -> torch.Tensor:
        """Each verdict on the coming step as the strictest process has it; the scaler hears of it too."""
        dist.all_reduce(verdicts, dist.ReduceOp.MAX)
        for found, verdict in zip(overflows, verdicts[len(verdicts) - len(overflows) :], strict=True):
            found.copy_(verdict)
        return verdicts

    def check_same(self) -> None:
        """Sees once in a run that a step has left every process with the same weights.

        Raises:
            RuntimeError: where it hasn't.
        """
        self.checked = True
        prints = everyones([float(local(p).detach().double().sum()) for p in self.phase.parameters()])
        for other, values in enumerate(prints):
            if any(not _same(a, b) for a, b in zip(values, prints[0], strict=True)):
                raise RuntimeError(
                    f"the weights of phase {self.phase.name!r} differ between rank 0 and rank {other} after an optimizer step: "
                    "their gradients have not travelled, or the processes began with other weights. Call the wrapped model, "
                    "and not its .module, in the objective; load weights before you wrap it"
                )


def _same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other) or abs(one - other) <= 1e-6 * max(abs(one), abs(other), 1.0)


def check_wrapped(phase: Phase) -> None:
    """Raises where a network is trained by several processes that don't know of each other.

    Raises:
        RuntimeError: says how to wrap it.
    """
    if replica(phase.module) is not None or shards(phase.module):
        return
    if any(hasattr(p, "to_local") for p in phase.module.parameters()):  # split over the processes in another way
        return
    raise RuntimeError(
        f"{world_size()} processes train, but the model of phase {phase.name!r} is wrapped for one: each would go its own way "
        f"(this is rank {rank()}). Wrap it before you make the optimizer: model = ignite.distributed.auto_model(model), "
        "DistributedDataParallel(model) or fully_shard(model)"
    )
