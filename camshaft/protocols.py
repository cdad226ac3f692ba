"""What the lower rooms know of a phase, a trainer, and a phase's strategies.

The engines are above checkpoints, distributed, cudagraphs and reports, and pass themselves to their functions. These protocols
are the part of an engine that such a function may use, so that no import goes up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from camshaft.grad_norms import GradNorms
from camshaft.objective import Objective
from camshaft.precision import Precision

__all__ = ["Execution", "GradientSync", "PhaseLike", "TrainerLike", "WindowLike"]


class WindowLike(Protocol):
    """The batches whose gradients make one optimizer step: ``camshaft.engines.window.Window``."""

    batches: int
    length: int
    weight: Any
    steps: int
    partial: str
    loss_weight: Any
    will_be_dropped: bool

    @property
    def is_empty(self) -> bool: ...

    def divisor(self, is_only_process: bool = True) -> Any: ...

    def reset(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class PhaseLike(Protocol):
    """A network with its optimizers, objective and window: ``camshaft.engines.phase.Phase``."""

    name: str
    module: nn.Module
    optimizers: tuple[Optimizer, ...]
    objective: Objective
    interval: int
    device: torch.device
    non_blocking: bool
    precision: Precision
    grad_norms: GradNorms
    optimizer_step: int
    skipped_steps: int
    forward_passes: int
    reduced_by_hand: bool
    has_own_zero_grad: bool
    gradient_sync: GradientSync
    execution: Execution

    @property
    def window(self) -> WindowLike: ...

    @property
    def window_is_open(self) -> bool: ...

    def parameters(self) -> list[nn.Parameter]: ...

    def zero_grad(self) -> None: ...

    def abandon_window(self) -> None: ...

    def forward(self, engine: Any, prepared: Any) -> None: ...

    def backward(self, state: Any, weight: Any) -> None: ...


class TrainerLike(Protocol):
    """An engine that trains phases: ``camshaft.engines.trainer.Trainer``."""

    state: Any
    handlers: dict[str, Any]
    unclaimed: dict[str, Any]
    last_batch: Any
    epoch_iteration: int
    _event_handlers: dict[Any, Any]

    @property
    def phases(self) -> Mapping[str, PhaseLike]: ...

    @property
    def primary(self) -> PhaseLike: ...


class GradientSync(Protocol):
    """How the gradients of a phase are synchronized between processes: a strategy that is called without a question."""

    def before_forward(self, phase: PhaseLike, engine: Any) -> None:
        """Called before each forward pass: says whether the backward pass that follows reduces gradients."""

    def reduce(self, phase: PhaseLike) -> None:
        """Reduces the gradients of a full window that the backward passes have not reduced."""

    def normalizer(self, phase: PhaseLike) -> Any:
        """The number by which the accumulated gradients must be divided; ``None`` for 1."""

    def max_over_ranks(self, flags: torch.Tensor, overflows: list[torch.Tensor]) -> torch.Tensor:
        """The maximum of each flag over all ranks; the last of them are the scaler's overflows, which are updated."""

    def after_step(self, phase: PhaseLike) -> None:
        """Called after each optimizer step."""

    def check_weights(self, phase: PhaseLike) -> None:
        """Raises ``RuntimeError`` if the ranks have different weights or learning rates."""

    def window_state(self, phase: PhaseLike) -> dict[str, Any]:
        """The gradients (and the weight) of an open window, as a checkpoint stores them."""

    def discard(self, phase: PhaseLike) -> None:
        """Clears gradients that have not been reduced."""

    def must_finish_window(self) -> bool:
        """Whether the open window holds gradients that can only be reduced at its end."""

    def restore(self) -> None:
        """Makes every backward pass reduce its gradients again, as before the run."""


class Execution(Protocol):
    """How the passes, the clipping and the optimizer step of a phase run: eagerly, or as CUDA graphs."""

    def forward_backward(self, phase: PhaseLike, engine: Any, prepared: Any, weight: Any) -> None:
        """Runs one batch forward and backward; sets ``state.loss``, ``state.y_pred`` and the gradients."""

    def inspect(
        self,
        phase: PhaseLike,
        settings: Hashable,
        given: list[torch.Tensor],
        check: Callable[[list[torch.Tensor], GradNorms], Any],
    ) -> Any:
        """Calls ``check(given, norms)``, which depends on nothing but the gradients, ``given`` and ``settings``."""

    def clip(self, phase: PhaseLike, settings: Hashable, clip: Callable[[GradNorms], torch.Tensor]) -> torch.Tensor:
        """Calls ``clip``, which depends on nothing but the gradients and ``settings``, and returns the norm."""

    def step(self, phase: PhaseLike) -> None:
        """Runs the step of the phase's optimizers."""

    def after_step(self, phase: PhaseLike, settings: Hashable, written: list[torch.Tensor], work: Callable[[], None]) -> None:
        """Calls ``work``, which reads the new weights, writes the tensors in ``written``, and depends on ``settings`` alone."""

    def check_event(self, event: Any) -> None:
        """Raises ``ValueError`` if no handler can run on this event."""

    def check_distributed(self) -> None:
        """Raises ``RuntimeError`` if it does not work with several processes."""

    def check_guards(self, phase: PhaseLike) -> None:
        """Called at the start and the end of each epoch, when anything about the model may have changed."""

    def invalidate(self, phase: PhaseLike) -> None:
        """Called after a checkpoint has been loaded."""

    def describe(self) -> str:
        """A few words for ``trainer.explain()``; empty for eager execution."""
