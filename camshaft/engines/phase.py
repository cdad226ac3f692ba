"""The training step: the batches of one network, their window, and its optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from camshaft.distributed.dtensors import local_tensor
from camshaft.distributed.gradient_sync import SingleProcess
from camshaft.engines.execution import EagerExecution
from camshaft.engines.window import Window
from camshaft.grad_norms import GradNorms
from camshaft.objective import as_objective
from camshaft.optimizers import has_own_zero_grad
from camshaft.precision import Precision
from camshaft.protocols import Execution, GradientSync
from camshaft.pytree import detach, to_device
from camshaft.resume.phase_state import check_phase_state, load_phase_state, phase_state_dict, sharding_reference
from camshaft.validation import bad_loss, check_count, check_device, check_optimizers, describe_type, no_gradients, stateful

__all__ = ["Phase"]


class Phase:
    """One network with its optimizer and objective, its own window, precision, scaler and clocks.

    The supervised trainer has one phase, a GAN has two, another alternating scheme any number. The first phase of a trainer is
    driven by the data: it runs one forward pass per iteration. Each other phase runs a full window after every ``interval``-th
    completed step of the first.

    Args:
        name: its name in ``phase=`` filters and in ``state.phase``.
        module: the network to train.
        optimizer: its optimizer, or several that step together.
        objective: called as ``objective(engine, batch)`` with the batch on the device, under autocast if precision is mixed.
            Returns the loss (a scalar tensor) or a mapping with ``"loss"``, whose other entries are logged by name.
        interval: for every phase but the first: the number of completed steps of the first phase between two turns.
        frozen: modules that the objective runs without training them; their parameters get no gradient.
        prepare: called as ``prepare(engine, batch)`` before ``FORWARD_STARTED``; returns the input of the objective. By
            default it moves the batch to ``device``.
        device: the device of the batches; by default that of the module's parameters.
        non_blocking: lets copies from pinned memory overlap with computation.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the optimizer can't train the module.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> phase = Phase("model", model, optimizer, lambda engine, batch: model(batch).square().mean())
        >>> phase.optimizer_step
        0
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        objective: Callable[[Any, Any], Any],
        *,
        interval: int = 1,
        frozen: Sequence[nn.Module] = (),
        prepare: Callable[[Any, Any], Any] | None = None,
        device: torch.device | str | None = None,
        non_blocking: bool = True,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"the model of phase {name!r} must be a torch.nn.Module, got {describe_type(module)}")
        if not callable(objective):
            raise TypeError(f"the objective of phase {name!r} must be callable, got {type(objective).__name__}")
        self.name, self.module, self.objective = name, module, as_objective(objective)
        self.interval = check_count(interval, "interval")
        self.optimizers = check_optimizers(optimizer, module, stateful(self.objective), name)
        self.frozen = tuple(frozen)
        self.device = check_device(device, module)
        self.non_blocking = non_blocking
        self.prepare = prepare or MoveToDevice(self.device, non_blocking)

        self.optimizer_step = 0
        """The number of completed optimizer steps; from ``GRADIENTS_READY`` on, the number of the current step."""
        self.skipped_steps = 0
        """The number of optimizer steps that the scaler or a handler has skipped."""
        self.forward_passes = 0
        """The number of batches that have run forward."""

        self.window = Window()
        self.precision = Precision()
        self.execution: Execution = EagerExecution()
        self.gradient_sync: GradientSync = SingleProcess()
        self.grad_norms = GradNorms()
        self.reduced_by_hand = False
        """Whether the objective calls the network without its DDP wrapper: gradients are reduced when a window is full."""
        self.has_own_zero_grad = any(map(has_own_zero_grad, self.optimizers))
        self.is_known_to_train = False
        """Whether the first window of this run has been seen to have gradients."""

        self._skip_requests: list[tuple[torch.Tensor, Callable[[], None] | None]] = []
        self._parameters: tuple[Any, list[nn.Parameter]] | None = None
        self._eval_modules: list[nn.Module] = []
        self._frozen_parameters: list[nn.Parameter] | None = None
        self.remember_modes()

    # -- the step, from top to bottom ---------------------------------------------------------------------------------

    def run(self, engine: Any, batch: Any) -> bool:
        """Runs one batch forward and backward, and makes the optimizer step if that fills the window.

        Args:
            engine: the trainer whose events fire.
            batch: as the data loader returned it.

        Returns:
            Whether an optimizer step was completed.
        """
        state, fire, window = engine.state, engine.fire, self.window
        state.phase, state.optimizer_step, state.skipped_steps = self.name, self.optimizer_step, self.skipped_steps
        if not self.module.training:
            self.restore_modes()
        if window.is_empty:
            self.zero_grad()
            window.open(engine, self)
        self.gradient_sync.before_forward(self, engine)

        prepared = self.prepare(engine, batch)
        self.forward_passes += 1
        fire.forward_started()
        weight = window.batch_weight(batch)
        self.execution.forward_backward(self, engine, prepared, weight)
        window.count(weight)
        fire.backward_completed()

        return window.is_full and self.close_window(engine)

    def close_window(self, engine: Any) -> bool:
        """Makes the optimizer step of the open window.

        Returns:
            Whether the step was completed; ``False`` if the scaler or a handler skipped it.
        """
        state, fire = engine.state, engine.fire
        state.phase, state.skipped_steps, state.grad_norm = self.name, self.skipped_steps, None
        self.gradient_sync.reduce(self)
        self.precision.unscale(self.optimizers)
        self.normalize_gradients()

        self.optimizer_step = state.optimizer_step = self.optimizer_step + 1
        completed = False
        try:
            fire.gradients_ready()
            fire.gradients_clipped()
            if not self.is_step_skipped():
                fire.optimizer_step_started()
                self.execution.step(self)
                completed = True
        finally:
            self.grad_norms.clear()
            if not completed:  # the next attempt gets the same number
                self.optimizer_step = state.optimizer_step = self.optimizer_step - 1

        self.window.reset()
        self.precision.update_scale(self.optimizers)
        if completed:
            self.gradient_sync.after_step(self)
            fire.optimizer_step_completed()
        else:
            self.skipped_steps = state.skipped_steps = self.skipped_steps + 1
            fire.optimizer_step_skipped()
        return completed

    def forward(self, engine: Any, prepared: Any) -> None:
        """Runs the objective on a prepared batch: sets ``state.loss``, with its graph."""
        with self.precision.autocast:
            result = self.objective(engine, prepared)
        state = engine.state
        state.loss = result if isinstance(result, torch.Tensor) else self._named_losses(state, result)

    def backward(self, state: Any, weight: Any) -> None:
        """Runs the backward pass of ``state.loss``, scaled for the window; detaches the loss and the prediction."""
        loss = state.loss
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise bad_loss(loss, f"the loss of phase {self.name!r} (from {self.objective.label})")
        self.precision.backward(self.window.scale_loss(loss, weight))
        state.loss = loss.detach()
        y_pred = state.y_pred
        if y_pred is not None:
            state.y_pred = y_pred.detach() if isinstance(y_pred, torch.Tensor) else detach(y_pred)

    def _named_losses(self, state: Any, result: Any) -> Any:
        """The loss of a mapping; its other entries are stored in ``state.losses``. :meth:`backward` checks anything else."""
        if not isinstance(result, Mapping):
            return result
        if "loss" not in result:
            raise TypeError(f"{self.objective.label} returned a mapping without 'loss'; it has {list(result)}")
        state.losses.update((name, detach(value)) for name, value in result.items() if name != "loss")
        return result["loss"]

    def normalize_gradients(self) -> None:
        """Divides the gradients by what the losses were not divided by in advance: weights, or a shorter window."""
        if not self.is_known_to_train:
            self.check_gradients()
        divisor = self.gradient_sync.normalizer(self)
        if divisor is not None:
            torch._foreach_div_([local_tensor(p.grad) for p in self.parameters() if p.grad is not None], divisor)

    def check_gradients(self) -> None:
        """Raises ``RuntimeError`` if no parameter has a gradient: called once per run, in the first window."""
        if all(parameter.grad is None for parameter in self.parameters()):
            raise no_gradients(f"the loss of phase {self.name!r} (from {self.objective.label})")
        self.is_known_to_train = True

    def skip_step_if(self, flag: torch.Tensor, then: Callable[[], None] | None = None) -> None:
        """Requests that the current step be skipped if ``flag`` is true; all flags are read in one transfer.

        Args:
            flag: a boolean scalar tensor, on any device.
            then: called if it is true; may raise.
        """
        self._skip_requests.append((flag, then))

    def is_step_skipped(self) -> bool:
        """Whether the scaler or a handler skips the step. If any asks, the host waits for the device here, and only here."""
        overflows = self.precision.overflows(self.optimizers)
        if not (overflows or self._skip_requests):
            return False
        requests, self._skip_requests = self._skip_requests, []
        flags = [flag for flag, _ in requests] + overflows
        stacked = torch.stack([flag.detach().to(flags[0].device, torch.float32) for flag in flags])
        verdicts = self.gradient_sync.max_over_ranks(stacked, overflows).tolist()
        for is_true, (_, then) in zip(verdicts, requests, strict=False):
            if is_true and then is not None:
                then()
        return any(verdicts)

    def overflows(self) -> list[torch.Tensor]:
        """What the scaler has found while unscaling: scalar tensors on the device, nonzero if the gradient overflowed."""
        return self.precision.overflows(self.optimizers)

    # -- the window ---------------------------------------------------------------------------------------------------

    @property
    def window_is_open(self) -> bool:
        """Whether gradients have been accumulated that no optimizer step has used yet."""
        return not self.window.is_empty

    def run_window(self, engine: Any, batch: Any) -> bool:
        """Runs a full window with the same ``batch`` in each pass, for a phase that is not driven by the data."""
        completed = False
        with self.frozen_modules():
            for _ in range(self.window.steps):
                completed = self.run(engine, batch)
        return completed

    def stop_window(self, engine: Any) -> bool:
        """Ends a window that the data has cut short: makes the step or drops it, according to the window's ``partial``."""
        if not self.window_is_open:
            return False
        if self.window.partial == "drop":
            self.abandon_window()
            return False
        return self.close_window(engine)

    def abandon_window(self) -> None:
        """Discards the open window and its gradients."""
        self.window.reset()
        self.gradient_sync.discard(self)
        self._skip_requests.clear()
        self.zero_grad()
        self.precision.discard_unscaling()

    def zero_grad(self) -> None:
        """Clears the gradients: as ``Optimizer.zero_grad()``, without its slow profiler annotation, unless it is overridden."""
        if self.has_own_zero_grad:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        else:
            for parameter in self.parameters():
                parameter.grad = None

    # -- parameters and modes -----------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the optimizers: those of the module in its order, then any others (of a loss function)."""
        groups = tuple(len(group["params"]) for o in self.optimizers for group in o.param_groups)
        if self._parameters is None or self._parameters[0] != groups:
            held = {id(p): p for o in self.optimizers for group in o.param_groups for p in group["params"]}
            ordered = [held.pop(id(p)) for p in self.module.parameters() if id(p) in held]
            self._parameters = groups, ordered + list(held.values())
        return self._parameters[1]

    def remember_modes(self) -> None:
        """Remembers the submodules that the user keeps in eval mode (a frozen BatchNorm) while the module trains."""
        self._frozen_parameters = None  # the frozen modules may have new parameters
        if self.module.training:
            self._eval_modules = [part for part in self.module.modules() if not part.training]
        self.execution.check_guards(self)

    def restore_modes(self) -> None:
        """Puts the module in training mode, except the submodules that the user keeps in eval mode."""
        self.module.train()
        for part in self._eval_modules:
            part.training = False

    @contextmanager
    def frozen_modules(self) -> Iterator[None]:
        """Freezes the parameters of ``frozen`` inside the block."""
        if self._frozen_parameters is None:
            self._frozen_parameters = [p for module in self.frozen for p in module.parameters()]
        trainable = [p for p in self._frozen_parameters if p.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything of this phase that a checkpoint holds, including the gradients of an open window."""
        return phase_state_dict(self)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if a state belongs to another model or optimizer; changes nothing."""
        check_phase_state(self, state)

    def sharding_reference(self, name: str) -> torch.Tensor | None:
        """The tensor whose sharding a tensor of :meth:`state_dict` has, by its path there, such as ``"module/0.weight"``."""
        return sharding_reference(self, name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state that :meth:`check_state_dict` has accepted."""
        load_phase_state(self, state)


class MoveToDevice:
    """The default ``prepare``: moves the batch to the phase's device."""

    def __init__(self, device: torch.device, non_blocking: bool) -> None:
        self.device, self.non_blocking = device, non_blocking

    def __call__(self, engine: Any, batch: Any) -> Any:
        return to_device(batch, self.device, self.non_blocking)
