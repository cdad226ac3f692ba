"""The training step: one network's batches on their way to an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from camshaft.checkpoints.phase_state import check_state, load_state, sharding_reference, state_of
from camshaft.cudagraphs.wrap import Capture
from camshaft.distributed.dtensors import local_tensor
from camshaft.distributed.gradient_sync import Replicas
from camshaft.engines.window import Window
from camshaft.events import StepEvents
from camshaft.grad_norms import Norms
from camshaft.optimizers import has_own_zero_grad
from camshaft.pytree import detach, to_device
from camshaft.validation import bad_loss, check_count, check_device, check_optimizers, describe_type, name_of, stateful

if TYPE_CHECKING:
    from camshaft.engines.trainer import Trainer

__all__ = ["Phase"]

# Enum members are slow to look up by attribute; the step fires these on every iteration.
(
    FORWARD_STARTED,
    FORWARD_COMPLETED,
    BACKWARD_STARTED,
    BACKWARD_COMPLETED,
    GRADIENTS_READY,
    GRADIENTS_CLIPPED,
    OPTIMIZER_STEP_STARTED,
    OPTIMIZER_STEP_COMPLETED,
    OPTIMIZER_STEP_SKIPPED,
) = StepEvents

Objective = Callable[[Any, Any], Any]


class Phase:
    """One network with its optimizer and objective, its own window, precision, scaler and clock.

    The supervised trainer is one phase, a GAN two, another alternating scheme any number. The first phase of a trainer is
    led by the data: it makes one forward pass per iteration. Every other follows it with a whole window of its own after
    each ``interval``-th completed step of the first.

    Args:
        name: what ``phase=`` filters and ``state.phase`` call it.
        module: the network that is trained.
        optimizer: its optimizer, or several that step together.
        objective: called as ``objective(engine, batch)`` with the batch on the device, under autocast where precision is
            mixed; returns the loss (a scalar tensor) or a mapping with ``"loss"``, whose other entries are logged by name.
        interval: for every phase but the first: after how many completed steps of the first phase it has its turn.
        frozen: modules that the objective passes through without training them; their parameters get no gradient.
        prepare: called as ``prepare(engine, batch)`` before ``FORWARD_STARTED``, returns what the objective gets; by
            default it moves the batch to ``device``.
        device: where batches are moved to; by default where the module's parameters are.
        non_blocking: lets copies from pinned memory run beside the host.

    Raises:
        TypeError: where an argument is of the wrong kind.
        ValueError: where the optimizer can't train the module.

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
        objective: Objective,
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
        check_count(interval, "interval")
        self.name, self.module, self.objective, self.interval = name, module, objective, interval
        self.optimizers = check_optimizers(optimizer, module, stateful(objective), name)
        self.frozen = tuple(frozen)
        self.device = check_device(device, module)
        self.non_blocking = non_blocking
        self.prepare = prepare or self._move

        self.optimizer_step = 0
        """The number of optimizer steps completed; inside a step, the number of the one being made."""
        self.skipped_steps = 0
        """How many optimizer steps the scaler or a guard has refused."""
        self.forward_passes = 0
        """The number of batches that have gone forward."""

        self.window = Window()
        self.autocast: torch.autocast | None = None
        self.scaler: torch.amp.GradScaler | None = None

        self.capture: Capture | None = None
        """Runs the passes and the step as CUDA graphs; ``None`` where they run one operation at a time."""
        self.reduced_by_hand = False
        """Whether the objective calls the network past its DDP wrapper, so that gradients are reduced when a window closes."""
        self.replicas: Replicas | None = None
        """The same network on other processes; ``None`` where there is one process."""

        self.norm_order = float("inf")
        """The order of the norm that a clipping takes of the gradients; whoever looks at them before takes the same."""
        self.norms: Norms | None = None
        """The norms of the open window's gradients, where somebody has taken them before the clipping."""

        self._refusals: list[tuple[torch.Tensor, Callable[[], None]]] = []
        self._parameters: tuple[Any, list[nn.Parameter]] | None = None
        self.has_own_zero_grad = any(has_own_zero_grad(item) for item in self.optimizers)
        """Whether an optimizer lets go of its gradients in another way than torch's do."""
        self._kept_in_eval: list[nn.Module] = []
        self._passed_through: list[nn.Parameter] | None = None
        self.remember_modes()

    # -- the step, from top to bottom ---------------------------------------------------------------------------------

    def run(self, engine: Trainer, batch: Any) -> bool:
        """Takes one batch forward and backward, and makes the optimizer step where that closes the window.

        Args:
            engine: the trainer whose events fire.
            batch: as the data loader gave it.

        Returns:
            Whether an optimizer step was completed.
        """
        state, fire, heard, window = engine.state, engine._fire_event, engine.heard, self.window
        if len(engine.phases) > 1:
            state.phase, state.optimizer_step, state.skipped_steps = self.name, self.optimizer_step, self.skipped_steps
        if not self.module.training:
            self.restore_modes()
        if window.batches == 0:
            self.zero_grad()
            if not window.is_single_batch:
                window.open(engine.batches_left if self is engine.primary else window.steps)
        if self.replicas is not None:
            self.replicas.announce(engine.length_is_known or self is not engine.primary)

        prepared = self.prepare(engine, batch)
        self.forward_passes += 1
        if heard.forward_started:
            fire(FORWARD_STARTED)
        if self.capture is None:
            self.forward(engine, prepared)
            if heard.forward_completed:
                fire(FORWARD_COMPLETED)
            if heard.backward_started:
                fire(BACKWARD_STARTED)
            weight = window.batch_weight(batch)
            self.backward(state, weight)
        else:
            weight = window.batch_weight(batch)
            self.capture.passes(engine, prepared, weight)
        window.count(weight)
        if heard.backward_completed:
            fire(BACKWARD_COMPLETED)

        return (window.is_single_batch or window.batches == window.length) and self.close_window(engine)

    def forward(self, engine: Trainer, prepared: Any) -> None:
        """Takes a prepared batch forward: ``state.loss`` is its loss, with the graph."""
        if self.autocast is None:
            result = self.objective(engine, prepared)
        else:
            with self.autocast:
                result = self.objective(engine, prepared)
        state = engine.state
        state.loss = result if isinstance(result, torch.Tensor) else self._named_losses(state, result)

    def backward(self, state: Any, weight: Any) -> None:
        """Takes ``state.loss`` backward, by its share of the window; nothing of the graph is left."""
        loss = state.loss
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise bad_loss(loss, f"the loss of phase {self.name!r} (from {name_of(self.objective)})")
        share = loss if self.window.is_single_batch else self.window.scale_loss(loss, weight)
        (share if self.scaler is None else self.scaler.scale(share)).backward()  # type: ignore[no-untyped-call]
        state.loss = loss.detach()
        y_pred = state.y_pred
        if y_pred is not None:
            state.y_pred = y_pred.detach() if isinstance(y_pred, torch.Tensor) else detach(y_pred)

    def close_window(self, engine: Trainer) -> bool:
        """Makes the optimizer step of the open window from the gradients that it has gathered.

        Returns:
            Whether the step was completed; not so where the scaler or a handler refused it.
        """
        state, fire, heard = engine.state, engine._fire_event, engine.heard
        state.phase, state.grad_norm = self.name, None
        if self.replicas is not None:
            self.replicas.reduce()
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        divisor = None if self.window.is_single_batch else self._divisor()
        if divisor is not None:
            torch._foreach_div_([local_tensor(p.grad) for p in self.parameters() if p.grad is not None], divisor)
        self.optimizer_step = state.optimizer_step = self.optimizer_step + 1
        completed = False
        try:
            if heard.gradients_ready:
                fire(GRADIENTS_READY)
            if heard.gradients_clipped:
                fire(GRADIENTS_CLIPPED)
            if not ((self._refusals or self.scaler is not None) and self._refused()):
                if heard.optimizer_step_started:
                    fire(OPTIMIZER_STEP_STARTED)
                self.step()
                completed = True
        finally:
            self.norms = None  # it holds the gradients
            if not completed:  # the next attempt has the number again
                self.optimizer_step = state.optimizer_step = self.optimizer_step - 1
        self.window.reset()
        if self.scaler is not None and any(self.scaler._found_inf_per_device(o) for o in self.optimizers):
            self.scaler.update()
        if completed:
            if self.replicas is not None and not self.replicas.checked:
                self.replicas.check_same()
            if heard.optimizer_step_completed:
                fire(OPTIMIZER_STEP_COMPLETED)
        else:
            self.skipped_steps = state.skipped_steps = self.skipped_steps + 1
            fire(OPTIMIZER_STEP_SKIPPED)
        return completed

    def step(self) -> None:
        """The optimizers' step, and nothing else."""
        if self.capture is not None and self.capture.records_steps:
            self.capture.step()
            return
        for optimizer in self.optimizers:
            optimizer.step()

    # -- the window ---------------------------------------------------------------------------------------------------

    @property
    def window_is_open(self) -> bool:
        """Whether gradients have been gathered that no optimizer step has used yet."""
        return self.window.batches > 0

    def run_window(self, engine: Trainer, batch: Any) -> bool:
        """A whole window at once, for a phase that isn't led by the data: each pass gets the same ``batch``."""
        completed = False
        with self.frozen_modules():
            for _ in range(self.window.steps):
                completed = self.run(engine, batch)
        return completed

    def stop_window(self, engine: Trainer) -> bool:
        """Ends a window that the data has cut short: steps or drops, as the window's ``partial`` says."""
        if not self.window_is_open:
            return False
        if self.window.partial == "drop":
            self.abandon_window()
            return False
        return self.close_window(engine)

    def abandon_window(self) -> None:
        """Throws away what the open window has gathered."""
        self.window.reset()
        if self.replicas is not None:
            self.replicas.forget()
        self._refusals.clear()
        self.zero_grad()
        if self.scaler is not None and self.scaler._scale is not None:
            self.scaler.update(self.scaler.get_scale())  # forgets that it has unscaled; the scale stays

    def zero_grad(self) -> None:
        """Lets go of the gradients of every parameter that this phase trains.

        What ``Optimizer.zero_grad()`` does, without its label for the profiler, which takes longer than a step's other lines;
        an optimizer that has a method of its own is asked.
        """
        if self.has_own_zero_grad:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        else:
            for parameter in self.parameters():
                parameter.grad = None

    def skip_step_if(self, flag: torch.Tensor, then: Callable[[], None]) -> None:
        """Asks that the coming step be refused where ``flag`` is true; all flags are fetched in one transfer.

        Args:
            flag: a boolean scalar tensor, on any device.
            then: called where it is true; may raise.
        """
        self._refusals.append((flag, then))

    def overflows(self) -> list[torch.Tensor]:
        """What the scaler has found while it unscaled: tensors on the device that aren't 0 where the gradient overflowed."""
        if self.scaler is None:
            return []
        return [found for o in self.optimizers for found in self.scaler._found_inf_per_device(o).values()]

    def _refused(self) -> bool:
        """Whether the scaler or a handler refuses the step: the one moment at which the host waits for the device."""
        refusals, self._refusals = self._refusals, []
        overflows = self.overflows()
        flags = [flag for flag, _ in refusals] + overflows
        if not flags:
            return False
        stacked = torch.stack([flag.detach().to(flags[0].device, torch.float32) for flag in flags])
        verdicts = (stacked if self.replicas is None else self.replicas.worst(stacked, overflows)).tolist()
        for refused, (_, then) in zip(verdicts, refusals, strict=False):
            if refused:
                then()
        return any(verdicts)

    def _divisor(self) -> Any:
        """What the gradients have yet to be divided by; each process's weights count."""
        divisor = self.window.divisor(alone=self.replicas is None)
        if self.replicas is None or self.window.loss_weight == "batch":
            return divisor
        return self.replicas.divisor(divisor)

    # -- loss and batch -----------------------------------------------------------------------------------------------

    def _move(self, engine: Trainer, batch: Any) -> Any:
        """The default ``prepare``: moves the batch."""
        return to_device(batch, self.device, self.non_blocking)

    def _named_losses(self, state: Any, result: Any) -> Any:
        """The loss out of a mapping, whose other entries are noted by name; anything else is found wrong later."""
        if not isinstance(result, Mapping):
            return result
        if "loss" not in result:
            raise TypeError(f"{name_of(self.objective)} returned a mapping without 'loss'; it has {list(result)}")
        state.losses.update((name, detach(value)) for name, value in result.items() if name != "loss")
        return result["loss"]

    # -- parameters and modes -----------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizers hold: those of the module in its order, then any others (a loss's)."""
        groups = tuple(len(group["params"]) for o in self.optimizers for group in o.param_groups)
        if self._parameters is None or self._parameters[0] != groups:
            held = {id(p): p for o in self.optimizers for group in o.param_groups for p in group["params"]}
            ordered = [held.pop(id(p)) for p in self.module.parameters() if id(p) in held]
            self._parameters = groups, ordered + list(held.values())
        return self._parameters[1]

    def remember_modes(self) -> None:
        """Notes which submodules the user keeps in eval mode (a frozen BatchNorm) while the module trains."""
        self._passed_through = None  # the frozen modules may have other parameters by now
        if self.module.training:
            self._kept_in_eval = [part for part in self.module.modules() if not part.training]
        if self.capture is not None:
            self.capture.check_surroundings()

    def restore_modes(self) -> None:
        """Puts the module in training mode, but for the submodules that the user keeps in eval mode."""
        self.module.train()
        for part in self._kept_in_eval:
            part.training = False

    @contextmanager
    def frozen_modules(self) -> Iterator[None]:
        """No gradient is made for the parameters of ``frozen``; they are as they were afterwards."""
        if self._passed_through is None:
            self._passed_through = [p for module in self.frozen for p in module.parameters()]
        held = [p for p in self._passed_through if p.requires_grad]
        for parameter in held:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in held:
                parameter.requires_grad_(True)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything of this phase that a checkpoint holds; an open window brings its gradients."""
        return state_of(self)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises where a state belongs to another model or optimizer; changes nothing.

        Raises:
            ValueError: names the keys or groups that differ.
        """
        check_state(self, state)

    def sharding_reference(self, name: str) -> torch.Tensor | None:
        """What a tensor of :meth:`state_dict` is sharded as, by its place there, such as ``"module/0.weight"``."""
        return sharding_reference(self, name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave and :meth:`check_state_dict` has found fitting."""
        load_state(self, state)
