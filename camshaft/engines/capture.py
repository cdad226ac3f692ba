"""The step as CUDA graphs, with every event but those inside the passes at its moment."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import EventsList
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as optimizer_hooks

from camshaft.batches import form, map_tensors
from camshaft.engines.checks import stateful
from camshaft.engines.recordings import RECORDERS, Kind, Recording, Recordings
from camshaft.events import StepEvents

if TYPE_CHECKING:
    from camshaft.engines.phase import Phase
    from camshaft.engines.trainer import Trainer

__all__ = ["Capture", "check_outside"]

PASSES = Kind(
    "the forward and backward pass",
    "the shapes of the batch and what of it is no tensor; pad batches to a few lengths, and make numbers that vary tensors",
)
CLIPPING = Kind("the clipping", "its bounds")
STEP = Kind(
    "the optimizer step",
    "the settings of the parameter groups; keep betas and momentum still (cycle_momentum=False), and where the learning rate "
    "changes with each step use Adam, AdamW or SGD(..., fused=True), which read it on the device",
)

INSIDE = (StepEvents.FORWARD_COMPLETED.name, StepEvents.BACKWARD_STARTED.name)


class Capture:
    """The passes, the clipping and the optimizer step of a phase as CUDA graphs.

    Each is a graph of its own, so that what listens between them runs as ever, and each is recorded in every form in which
    it comes: a graph holds what the device does, and repeats whatever Python decided on the way. Work of a form that is met
    too seldom runs without a graph, with the same numbers.

    A graph reads and writes the same memory each time. Batches are copied into it, results out of it, and every window's
    gradients live in it (:attr:`home`), wherever they were made.

    Args:
        phase: the phase.

    Raises:
        ValueError: where its device has no graphs, or an optimizer that could be captured wasn't made for it.
    """

    def __init__(self, phase: Phase) -> None:
        recorder = RECORDERS.get(phase.device.type)
        if recorder is None:
            raise ValueError(
                f"capture=True records CUDA graphs: the model must be on a CUDA device, but it is on {phase.device}"
            )
        for optimizer in phase.optimizers:
            check_capturable(optimizer)
        self.phase, self._recorder = phase, recorder
        self.forget()

    def forget(self) -> None:
        """Throws all recordings away: what they read or write is elsewhere now, or isn't the same."""
        self.recordings = Recordings(self._recorder(self.phase.device), f"phase {self.phase.name!r}")
        self.home: list[torch.Tensor | None] = []
        """For each parameter of the phase, the gradient that the graphs know; ``None`` for one without."""
        self.is_home = False
        """Whether the open window's gradients are these."""
        self._rates: list[tuple[dict[str, Any], torch.Tensor, Any]] = []
        self._trained: list[bool] = []
        self._surroundings: dict[Hashable, Any] = {}

    @property
    def records_steps(self) -> bool:
        """Whether the optimizers' step can be recorded."""
        return all(is_recordable(optimizer) for optimizer in self.phase.optimizers)

    # -- the passes ---------------------------------------------------------------------------------------------------

    def passes(self, engine: Trainer, prepared: Any, weight: Any) -> None:
        """One batch forward and backward: leaves ``state.loss``, ``state.y_pred`` and gradients, as without a graph."""
        phase, state, first = self.phase, engine.state, self.phase.window.batches == 0
        trained = [p.requires_grad for p in phase.parameters()]
        if trained != self._trained:  # somebody has frozen or unfrozen
            self.forget()
            self._trained = trained
        given: list[torch.Tensor] = []
        inputs = prepared, state.x, state.y, weight
        key = first, phase.window.length, phase.autocast, phase.scaler, form(inputs, given)
        if not (self.recordings.is_due(PASSES, key) and (first or self.is_home)):
            phase.forward(engine, prepared)
            phase.backward(state, weight)
            if first:
                self._bring_home()
                if self.home and not self.is_home:  # it trains other parameters than the graphs do
                    self.recordings.leave_alone(PASSES, key)
            return
        recording = self.recordings.get(PASSES, key) or self._record_passes(engine, inputs, given, key)
        torch._foreach_copy_(recording.inputs, given)
        recording.replay()
        state.loss, state.y_pred, losses = map_tensors(torch.clone, recording.results)
        state.losses.update(losses)
        if first:
            for parameter, gradient in zip(phase.parameters(), self.home, strict=True):
                parameter.grad = gradient
            self.is_home = True

    def _record_passes(self, engine: Trainer, inputs: Any, given: list[torch.Tensor], key: Hashable) -> Recording:
        phase, state, first = self.phase, engine.state, self.phase.window.batches == 0
        for tensor in given:
            if tensor.device.type != phase.device.type:
                raise ValueError(
                    f"capture=True needs the whole batch on {phase.device}, but a tensor of shape {tuple(tensor.shape)} is on "
                    f"{tensor.device}: the graph would keep its first values. Let prepare_batch move it"
                )
        held = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given]
        following = iter(held)
        prepared, x, y, weight = map_tensors(lambda _: next(following), inputs)

        def work() -> Any:
            phase.forward(engine, prepared)
            phase.backward(state, weight)
            if first and self.home:
                self._bring_home()
            return state.loss, state.y_pred, dict(state.losses)

        kept = state.x, state.y, state.losses
        state.x, state.y, state.losses = x, y, {}
        try:
            recording = self._record(PASSES, key, work, held)
        finally:
            state.x, state.y, state.losses = kept
        if first and not self.home:
            self.home = [p.grad for p in phase.parameters()]
        return recording

    # -- the gradients ------------------------------------------------------------------------------------------------

    def _bring_home(self) -> None:
        """Moves gradients that were made elsewhere to where the graphs know them, if they are of the same parameters."""
        parameters = self.phase.parameters()
        made = [p.grad for p in parameters]
        self.is_home = [gradient is None for gradient in made] == [gradient is None for gradient in self.home]
        if not self.is_home:
            return
        away = [(p, home, g) for p, home, g in zip(parameters, self.home, made, strict=True) if g is not home]
        torch._foreach_copy_([home for _, home, _ in away], [gradient for _, _, gradient in away])  # type: ignore[misc]
        for parameter, home, _ in away:
            parameter.grad = home

    def _are_home(self) -> bool:
        """Whether the graphs know the gradients; one that a handler has put in another's place is moved there."""
        if any(p.grad is not home for p, home in zip(self.phase.parameters(), self.home, strict=True)):
            self._bring_home()
        return self.is_home

    # -- what is done with them ---------------------------------------------------------------------------------------

    def clip(self, bounds: Hashable, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Clips the window's gradients.

        Args:
            bounds: whatever ``work`` depends on beside the gradients.
            work: clips, and returns the norm.

        Returns:
            The norm.
        """
        norm: torch.Tensor = self._work(CLIPPING, bounds, work)
        return norm

    def step(self) -> None:
        """The step of the phase's optimizers, with learning rates that a graph reads anew each time."""
        optimizers = self.phase.optimizers
        if not self.records_steps:
            for optimizer in optimizers:
                optimizer.step()
            return

        def work() -> None:
            with self._rates_on_device():
                for optimizer in optimizers:
                    optimizer.step()

        self._follow_rates()
        self._work(STEP, tuple(settings_of(optimizer) for optimizer in optimizers), work)

    def _work(self, kind: Kind, settings: Hashable, work: Callable[[], Any]) -> Any:
        if not (self.recordings.is_due(kind, settings) and self.is_home and self._are_home()):
            return work()
        recording = self.recordings.get(kind, settings) or self._record(kind, settings, work, [])
        recording.replay()
        return map_tensors(torch.clone, recording.results)

    def _follow_rates(self) -> None:
        """Brings the device's learning rates to those of the parameter groups, where they have changed."""
        groups = [group for o in self.phase.optimizers if takes_tensor_rate(o) for group in o.param_groups]
        if [id(group) for group in groups] != [id(group) for group, _, _ in self._rates]:
            if self._rates:  # an optimizer has another group, or has loaded a state
                self.forget()
            device = self.phase.device
            self._rates = [(group, torch.empty((), dtype=torch.float32, device=device), None) for group in groups]
        for number, (group, rate, known) in enumerate(self._rates):
            wanted = group["lr"]
            if isinstance(wanted, torch.Tensor):
                rate.copy_(wanted.reshape(()), non_blocking=True)
            elif wanted != known:
                rate.fill_(wanted)
                self._rates[number] = group, rate, wanted

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Gives the optimizers their learning rates as tensors, with and without a graph, so that both do the same sums."""
        kept = [group["lr"] for group, _, _ in self._rates]
        for group, rate, _ in self._rates:
            group["lr"] = rate
        try:
            yield
        finally:
            for (group, _, _), wanted in zip(self._rates, kept, strict=True):
                group["lr"] = wanted

    # -- recordings ---------------------------------------------------------------------------------------------------

    def _record(self, kind: Kind, key: Hashable, work: Callable[[], Any], inputs: list[torch.Tensor]) -> Recording:
        recording = self.recordings.record(kind, key, work, inputs)
        self._surroundings = surroundings(self.phase)
        return recording

    def check_surroundings(self) -> None:
        """Throws the recordings away where a tensor that they know is elsewhere now, or a module in another mode."""
        now = surroundings(self.phase) if self._surroundings else {}
        if any(now.get(name) != known for name, known in self._surroundings.items()):
            self.forget()


def surroundings(phase: Phase) -> dict[Hashable, Any]:
    """Where the tensors of a phase's network, loss and optimizers are, and which of its modules don't train."""
    found: dict[Hashable, Any] = {"modes": [id(part) for part in phase.kept_in_eval]}
    parts = [phase.module, stateful(phase.objective)]
    for place, part in enumerate(part for part in parts if isinstance(part, nn.Module)):
        held = (*part.named_parameters(), *part.named_buffers())
        found |= {(place, name): tensor.data_ptr() for name, tensor in held}
    for number, optimizer in enumerate(phase.optimizers):
        for parameter, state in optimizer.state.items():
            tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
            found |= {(number, id(parameter), name): value.data_ptr() for name, value in tensors.items()}
    return found


def check_outside(event: Any) -> None:
    """Raises where an event would fire inside a graph."""
    for single in event if isinstance(event, EventsList) else (event,):
        name = getattr(single, "name", single)
        if name in INSIDE:
            raise ValueError(
                f"{name} is inside the CUDA graph of capture=True, where no handler can run: listen to FORWARD_STARTED or "
                "BACKWARD_COMPLETED, or compute it in the model, loss_fn or compute_loss"
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


def takes_tensor_rate(optimizer: Optimizer) -> bool:
    """Whether a learning rate can be a tensor that the step reads on the device; any other is recorded as it was."""
    return type(optimizer) in (Adam, AdamW) or (type(optimizer) is SGD and bool(optimizer.defaults.get("fused")))


def settings_of(optimizer: Optimizer) -> Hashable:
    """Whatever a recorded step knows of an optimizer's parameter groups."""
    apart = ("params", "lr") if takes_tensor_rate(optimizer) else ("params",)
    groups = optimizer.param_groups
    return tuple((len(g["params"]), *((name, value) for name, value in g.items() if name not in apart)) for g in groups)
