"""The step as CUDA graphs, with every event but those inside the passes at its moment."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch

from camshaft.cudagraphs.checks import (
    check_capturable,
    check_device,
    check_input,
    check_leaves,
    is_recordable,
    leaves_of,
    settings_of,
)
from camshaft.cudagraphs.graphs import RECORDERS, Kind, Recording, Recordings
from camshaft.cudagraphs.guards import Surroundings
from camshaft.optimizers import DeviceRates
from camshaft.pytree import map_tensors, signature

if TYPE_CHECKING:
    from camshaft.engines.phase import Phase
    from camshaft.engines.trainer import Trainer

__all__ = ["Capture"]

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

OFTEN = 10
"""How often graphs are thrown away before a warning says so."""


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
        check_device(phase)
        self._forgotten = 0
        self.forget()

    def forget(self, because: str | None = None) -> None:
        """Throws all recordings away: what they read or write is elsewhere now, or isn't the same.

        Args:
            because: what has changed while they were in use; where that happens over and over, a warning says it.
        """
        self._forgotten += because is not None
        if self._forgotten == OFTEN:
            warnings.warn(
                f"capture=True: the graphs of phase {self.phase.name!r} have been thrown away {OFTEN} times, lastly because "
                f"{because}; until they are recorded anew it runs without",
                stacklevel=2,
            )
        self.recordings = Recordings(self._recorder(self.phase.device), f"phase {self.phase.name!r}")
        self.home: list[torch.Tensor | None] = []
        """For each parameter of the phase, the gradient that the graphs know; ``None`` for one without."""
        self.is_home = False
        """Whether the open window's gradients are these."""
        self._home_places: list[int] = []
        self._rates = DeviceRates(self.phase.optimizers, self.phase.device)
        self._surroundings: Surroundings | None = None
        self._leaves: dict[Hashable, list[torch.Tensor]] = {}  # whose gradients a pass made that is going to be recorded

    @property
    def records_steps(self) -> bool:
        """Whether the optimizers' step can be recorded."""
        return all(is_recordable(optimizer) for optimizer in self.phase.optimizers)

    # -- the passes ---------------------------------------------------------------------------------------------------

    def passes(self, engine: Trainer, prepared: Any, weight: Any) -> None:
        """One batch forward and backward: leaves ``state.loss``, ``state.y_pred`` and gradients, as without a graph."""
        phase, state, first = self.phase, engine.state, self.phase.window.batches == 0
        self._look_around(at_weights=True)
        given: list[torch.Tensor] = []
        inputs = prepared, state.x, state.y, weight
        key = first, phase.window.length, phase.autocast, phase.scaler, signature(inputs, given)
        recording = None
        if self.recordings.is_due(PASSES, key) and (self._are_none() if first else self._are_home()):
            recording = self.recordings.get(PASSES, key) or self._record_passes(engine, inputs, given, key)
        if recording is None:
            phase.forward(engine, prepared)
            if self.recordings.is_next(PASSES, key):
                self._leaves[key] = leaves_of(state.loss)
            phase.backward(state, weight)
            if first:
                self._bring_home()
            return
        if given:
            with torch.no_grad():
                torch._foreach_copy_(recording.inputs, given)
        recording.replay()
        state.loss, state.y_pred, losses = map_tensors(torch.clone, recording.results)
        state.losses.update(losses)
        if first:
            self._put_gradients(self.home)
            self.is_home = True

    def _record_passes(self, engine: Trainer, inputs: Any, given: list[torch.Tensor], key: Hashable) -> Recording | None:
        """Records the passes; ``None`` where they train other parameters than the graphs that there are."""
        phase, state, first = self.phase, engine.state, self.phase.window.batches == 0
        for tensor in given:
            check_input(tensor, phase.device)
        fixed = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given]
        following = iter(fixed)
        prepared, x, y, weight = map_tensors(lambda _: next(following), inputs)

        leaves: list[torch.Tensor] = []

        def work() -> Any:
            phase.forward(engine, prepared)
            leaves[:] = leaves_of(state.loss)
            phase.backward(state, weight)
            if first and self.home:
                self._bring_home()
            return state.loss, state.y_pred, dict(state.losses)

        kept = state.x, state.y, state.losses
        before = [p.grad for p in phase.parameters()]
        state.x, state.y, state.losses = x, y, {}
        try:
            recording = self._record(PASSES, key, work, fixed)
        except BaseException:
            self._put_gradients(before)
            raise
        finally:
            state.x, state.y, state.losses = kept
        if recording is None:
            return None
        met = {id(leaf) for leaf in self._leaves.pop(key, ())}
        check_leaves([leaf for leaf in leaves if id(leaf) in met], phase)  # others are made by the pass itself
        if first and not self.home:
            self.home = [p.grad for p in phase.parameters()]
            self._home_places = places_of(self.home)
        if any(p.grad is not home for p, home in zip(phase.parameters(), self.home, strict=True)):
            self.recordings.leave_alone(PASSES, key)
            self._put_gradients(before)
            return None
        return recording

    # -- the gradients ------------------------------------------------------------------------------------------------

    def _bring_home(self) -> None:
        """Moves gradients that were made elsewhere to where the graphs know them, if they are of the same parameters."""
        parameters = self.phase.parameters()
        made = [p.grad for p in parameters]
        self.is_home = [gradient is None for gradient in made] == [home is None for home in self.home]
        away = [(home, g) for home, g in zip(self.home, made, strict=True) if g is not home] if self.is_home else []
        if away:
            torch._foreach_copy_([home for home, _ in away], [gradient for _, gradient in away])  # type: ignore[misc]
            self._put_gradients(self.home)

    def _are_none(self) -> bool:
        """Whether a window's gradients begin with its first pass; a handler may have made some before."""
        return self.phase.has_own_zero_grad or all(p.grad is None for p in self.phase.parameters())

    def _are_home(self) -> bool:
        """Whether the graphs know the window's gradients; one that a handler has put in another's place is moved there."""
        made = [p.grad for p in self.phase.parameters()]
        if self.is_home and not (len(made) == len(self.home) and all(map(operator.is_, made, self.home))):
            self._bring_home()
        return self.is_home

    def _look_around(self, at_weights: bool) -> None:
        """Throws the recordings away where gradients or weights are in other memory now, or train otherwise."""
        moved = at_weights and self._surroundings is not None and self._surroundings.have_moved()
        if moved or places_of(self.home) != self._home_places:
            self.forget("a parameter or a gradient is in other memory, a parameter frozen, or a module in another mode")

    def _put_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self.phase.parameters(), gradients, strict=True):
            parameter.grad = gradient

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
        if self._surroundings is not None and self._surroundings.states_have_gone():
            self.forget("an optimizer has lost its state")
        if not self._rates.are_of(optimizers):
            self.forget("an optimizer has another group, or has loaded a state")
        rates = self._rates
        rates.follow()

        def work() -> None:
            with rates.in_place():
                for optimizer in optimizers:
                    optimizer.step()

        made = tuple([p.grad is None for p in self.phase.parameters()])  # the first steps of a parameter make its state
        self._work(STEP, (made, *[settings_of(optimizer) for optimizer in optimizers]), work)

    def _work(self, kind: Kind, settings: Hashable, work: Callable[[], Any]) -> Any:
        self._look_around(at_weights=kind is STEP)
        if not (self.recordings.is_due(kind, settings) and self._are_home()):
            return work()
        recording = self.recordings.get(kind, settings) or self._record(kind, settings, work, [])
        if recording is None:
            return work()
        recording.replay()
        return map_tensors(torch.clone, recording.results)

    # -- recordings ---------------------------------------------------------------------------------------------------

    def _record(self, kind: Kind, key: Hashable, work: Callable[[], Any], inputs: list[torch.Tensor]) -> Recording | None:
        """Records some work; ``None`` where what the other recordings take for agreed has changed."""
        before = Surroundings(self.phase)
        if self._is_another(before):
            return None
        held = [*before.tensors, *self._rates.tensors, *[g for g in self.home if g is not None]]
        try:
            recording = self.recordings.record(kind, key, work, inputs, held)
            changed = Surroundings(self.phase).differing(before)
        finally:
            before.restore()  # what the recording has put there is memory that nothing has written
        if changed:
            self.forget()
            raise RuntimeError(
                f"capture=True: {kind.name} of phase {self.phase.name!r} puts something new into {', '.join(changed[:5])}, "
                "which a graph can't repeat. Change a tensor in place (copy_, lerp_, add_), make a tensor of a number, and "
                "return from compute_loss by name what is only looked at. The older weight_norm and spectral_norm of "
                "torch.nn.utils do so too: take those of torch.nn.utils.parametrizations"
            )
        self._surroundings = before
        return recording

    def check_surroundings(self) -> None:
        """Throws the recordings away where anything that they take for agreed is another now."""
        if self._surroundings is not None:
            self._is_another(Surroundings(self.phase))

    def _is_another(self, now: Surroundings) -> bool:
        changed = now.differing(self._surroundings) if self._surroundings is not None else []
        if changed:
            self.forget(f"of a change of {', '.join(changed[:3])}")
        return bool(changed)


def places_of(gradients: list[torch.Tensor | None]) -> list[int]:
    """Where gradients are."""
    return list(map(torch.Tensor.data_ptr, filter(torch.is_tensor, gradients)))
