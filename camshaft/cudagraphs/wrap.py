"""Execution of a phase as CUDA graphs: the passes, the clipping and the optimizer step, each captured once and replayed."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from camshaft.cudagraphs.checks import (
    captures_steps,
    check_capturable,
    check_input,
    check_leaves,
    check_outside,
    check_single_device,
    grads_are_none,
    group_settings,
    leaves_of,
)
from camshaft.cudagraphs.graphs import CAPTURERS, CapturedGraph, GraphCache, Kind
from camshaft.cudagraphs.guards import Guards, addresses
from camshaft.grad_norms import GradNorms
from camshaft.optimizers import TensorLRs
from camshaft.protocols import PhaseLike
from camshaft.pytree import map_tensors, signature

__all__ = ["CudaGraphExecution"]

PASSES = Kind(
    "the forward and backward pass",
    "the shapes of the batch and everything in it that is not a tensor; pad batches to a few lengths, and turn numbers that "
    "vary into tensors",
)
INSPECTION = Kind("the check of losses and gradients", "the number of batches in a window")
CLIPPING = Kind("the clipping", "its bounds")
STEP = Kind(
    "the optimizer step",
    "the settings of the parameter groups; keep betas and momentum constant (cycle_momentum=False), and if the learning rate "
    "changes with each step use Adam, AdamW or SGD(..., fused=True), which read it on the device",
)
AFTER_STEP = Kind("the average of the weights", "its decay rate and the memory of the average")

MAX_INVALIDATIONS = 10
"""The number of invalidations after which a warning reports them."""


class CudaGraphExecution:
    """Runs the passes, the clipping and the optimizer step of a phase as CUDA graphs.

    Each is a graph of its own, so that the handlers between them run as usual. Each is captured once per input signature: a
    graph holds the work of the device, and repeats whatever Python decided at capture. Work whose signature is rare runs
    eagerly, with the same numbers.

    A graph always reads and writes the same memory. Batches are copied into it, results out of it, and the gradients of every
    window end up in it (:attr:`static_grads`), wherever they were computed.

    Args:
        phase: the phase.

    Raises:
        ValueError: if the phase's device has no graphs, or an optimizer was not made with ``capturable=True``.
    """

    def __init__(self, phase: PhaseLike) -> None:
        capturer = CAPTURERS.get(phase.device.type)
        if capturer is None:
            raise ValueError(
                f"capture=True records CUDA graphs: the model must be on a CUDA device, but it is on {phase.device}"
            )
        for optimizer in phase.optimizers:
            check_capturable(optimizer)
        check_single_device(phase)
        self._capturer, self._invalidations = capturer, 0
        self._steps_are_captured = captures_steps(phase)
        self.invalidate(phase)

    def invalidate(self, phase: PhaseLike, reason: str | None = None) -> None:
        """Discards all graphs, because the memory or the settings they rely on have changed.

        Args:
            phase: the phase.
            reason: what has changed while the graphs were in use; if that happens again and again, a warning reports it.
        """
        self._invalidations += reason is not None
        if self._invalidations == MAX_INVALIDATIONS:
            warnings.warn(
                f"capture=True: the graphs of phase {phase.name!r} have been invalidated {MAX_INVALIDATIONS} times, most "
                f"recently because {reason}; until they are captured again the phase runs without",
                stacklevel=2,
            )
        self.graphs = GraphCache(self._capturer(phase.device), f"phase {phase.name!r}")
        self.static_grads: list[torch.Tensor | None] = []
        """For each parameter of the phase the gradient that the graphs write; ``None`` for a parameter without one."""
        self.grads_are_static = False
        """Whether the gradients of the open window are these."""
        self._static_tensors: list[torch.Tensor] = []
        self._static_addresses: list[int] = []
        self._lrs = TensorLRs(phase.optimizers, phase.device)
        self._guards: Guards | None = None
        self._leaves: dict[Hashable, list[torch.Tensor]] = {}  # the leaves of the last eager pass before a capture

    def check_event(self, event: Any) -> None:
        """Raises ``ValueError`` if an event fires inside a graph, where no handler can run."""
        check_outside(event)

    def check_distributed(self) -> None:
        """Raises ``RuntimeError``: communication between processes is not captured."""
        raise RuntimeError(
            "capture=True is for one process: what the processes send each other can't be captured; leave it out"
        )

    def describe(self) -> str:
        """A few words for ``trainer.explain()``."""
        return "as CUDA graphs" if self._steps_are_captured else "as CUDA graphs (except the optimizer step)"

    # -- the passes ---------------------------------------------------------------------------------------------------

    def forward_backward(self, phase: PhaseLike, engine: Any, prepared: Any, weight: Any) -> None:
        """Runs one batch forward and backward; sets ``state.loss``, ``state.y_pred`` and the gradients as in eager mode."""
        state, is_first = engine.state, phase.window.is_empty
        self._check_cheap_guards(phase, with_weights=True)
        given: list[torch.Tensor] = []
        inputs = prepared, state.x, state.y, weight
        key = is_first, phase.window.length, phase.precision, signature(inputs, given)
        graph = None
        if self.graphs.should_capture(PASSES, key) and (grads_are_none(phase) if is_first else self._has_static_grads(phase)):
            graph = self.graphs.get(PASSES, key) or self._capture_passes(phase, engine, inputs, given, key)
        if graph is None:
            phase.forward(engine, prepared)
            if self.graphs.is_last_warmup(PASSES, key):
                self._leaves[key] = leaves_of(state.loss)
            phase.backward(state, weight)
            if is_first:
                self._copy_to_static_grads(phase)
            return
        if given:
            with torch.no_grad():
                torch._foreach_copy_(graph.inputs, given)
        graph.replay()
        state.loss, state.y_pred, losses = map_tensors(torch.clone, graph.results)
        state.losses.update(losses)
        if is_first:
            set_grads(phase, self.static_grads)
            self.grads_are_static = True

    def _capture_passes(
        self, phase: PhaseLike, engine: Any, inputs: Any, given: list[torch.Tensor], key: Hashable
    ) -> CapturedGraph | None:
        """Captures the passes; ``None`` if they train other parameters than the existing graphs."""
        state, is_first = engine.state, phase.window.is_empty
        for tensor in given:
            check_input(tensor, phase.device)
        static_inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given]
        remaining = iter(static_inputs)
        prepared, x, y, weight = map_tensors(lambda _: next(remaining), inputs)
        leaves: list[torch.Tensor] = []

        def run_passes() -> Any:
            phase.forward(engine, prepared)
            leaves[:] = leaves_of(state.loss)
            phase.backward(state, weight)
            if is_first and self.static_grads:
                self._copy_to_static_grads(phase)
            return state.loss, state.y_pred, dict(state.losses)

        outer = state.x, state.y, state.losses
        grads_before = [p.grad for p in phase.parameters()]
        state.x, state.y, state.losses = x, y, {}
        try:
            graph = self._capture(phase, PASSES, key, run_passes, static_inputs)
        except BaseException:
            set_grads(phase, grads_before)
            raise
        finally:
            state.x, state.y, state.losses = outer
        if graph is None:
            return None
        known = {id(leaf) for leaf in self._leaves.pop(key, ())}
        check_leaves([leaf for leaf in leaves if id(leaf) in known], phase)  # the pass itself creates any others
        if is_first and not self.static_grads:
            self.static_grads = [p.grad for p in phase.parameters()]
            self._static_tensors = [grad for grad in self.static_grads if grad is not None]
            self._static_addresses = addresses(self._static_tensors)
        if any(p.grad is not static for p, static in zip(phase.parameters(), self.static_grads, strict=True)):
            self.graphs.disable(PASSES, key)
            set_grads(phase, grads_before)
            return None
        return graph

    # -- the gradients ------------------------------------------------------------------------------------------------

    def _copy_to_static_grads(self, phase: PhaseLike) -> None:
        """Copies gradients into the memory that the graphs use, if they belong to the same parameters."""
        grads = [p.grad for p in phase.parameters()]
        self.grads_are_static = [grad is None for grad in grads] == [static is None for static in self.static_grads]
        if not self.grads_are_static:
            return
        elsewhere = [(static, grad) for static, grad in zip(self.static_grads, grads, strict=True) if grad is not static]
        if elsewhere:
            torch._foreach_copy_([static for static, _ in elsewhere], [grad for _, grad in elsewhere])  # type: ignore[misc]
            set_grads(phase, self.static_grads)

    def _has_static_grads(self, phase: PhaseLike) -> bool:
        """Whether the window's gradients are in the graphs' memory; if a handler has replaced one, it is copied there."""
        grads = [p.grad for p in phase.parameters()]
        is_same = len(grads) == len(self.static_grads) and all(map(operator.is_, grads, self.static_grads))
        if self.grads_are_static and not is_same:
            self._copy_to_static_grads(phase)
        return self.grads_are_static

    # -- clipping and step --------------------------------------------------------------------------------------------

    def inspect(
        self,
        phase: PhaseLike,
        settings: Hashable,
        given: list[torch.Tensor],
        check: Callable[[list[torch.Tensor], GradNorms], Any],
    ) -> Any:
        """Checks the window's losses and gradients, and returns what it has found."""
        if any(tensor.device != phase.device for tensor in given):
            return check(given, phase.grad_norms)
        settings = settings, signature(given, [])
        return self._run(phase, INSPECTION, settings, lambda inputs: check(inputs, GradNorms()), given)

    def clip(self, phase: PhaseLike, settings: Hashable, clip: Callable[[GradNorms], torch.Tensor]) -> torch.Tensor:
        """Clips the window's gradients.

        Args:
            phase: the phase.
            settings: everything that ``clip`` depends on besides the gradients.
            clip: clips, and returns the norm.

        Returns:
            The norm.
        """
        norm: torch.Tensor = self._run(phase, CLIPPING, settings, lambda _: clip(GradNorms()))
        phase.grad_norms.clear()  # a replay changes the gradients, but not their version counters
        return norm

    def step(self, phase: PhaseLike) -> None:
        """Runs the step of the phase's optimizers, with learning rates that the graph reads at each replay."""
        self._steps_are_captured = captures_steps(phase)
        if not self._steps_are_captured:
            for optimizer in phase.optimizers:
                optimizer.step()
            return
        if self._guards is not None and self._guards.optimizer_state_lost():
            self.invalidate(phase, "an optimizer has lost its state")
        if not self._lrs.belong_to(phase.optimizers):
            self.invalidate(phase, "an optimizer has another group, or has loaded a state")
        lrs = self._lrs
        lrs.sync()

        def run_step(_: Any) -> None:
            with lrs.applied():
                for optimizer in phase.optimizers:
                    optimizer.step()

        has_no_grad = tuple([p.grad is None for p in phase.parameters()])  # a parameter's first step creates its state
        self._run(phase, STEP, (has_no_grad, *[group_settings(optimizer) for optimizer in phase.optimizers]), run_step)

    def after_step(self, phase: PhaseLike, settings: Hashable, written: list[torch.Tensor], work: Callable[[], None]) -> None:
        """Does some work with the new weights, which may be captured if the step before it is."""
        if self._steps_are_captured:
            self._run(phase, AFTER_STEP, (settings, *addresses(written)), lambda _: work(), written=written)
        else:
            work()

    def _run(
        self,
        phase: PhaseLike,
        kind: Kind,
        settings: Hashable,
        work: Callable[[list[torch.Tensor]], Any],
        given: Sequence[torch.Tensor] = (),
        written: Sequence[torch.Tensor] = (),
    ) -> Any:
        """Calls ``work(given)``, or replays its graph on the values of ``given``."""
        self._check_cheap_guards(phase, with_weights=kind in (STEP, AFTER_STEP))
        if not (self.graphs.should_capture(kind, settings) and self._has_static_grads(phase)):
            return work([*given])
        graph = self.graphs.get(kind, settings)
        if graph is None:
            inputs = [tensor.clone() for tensor in given]
            graph = self._capture(phase, kind, settings, lambda: work(inputs), inputs, written)
        if graph is None:
            return work([*given])
        if given:
            torch._foreach_copy_(graph.inputs, [*given])
        graph.replay()
        return map_tensors(torch.clone, graph.results)

    # -- capture and guards -------------------------------------------------------------------------------------------

    def _capture(
        self,
        phase: PhaseLike,
        kind: Kind,
        key: Hashable,
        work: Callable[[], Any],
        inputs: list[torch.Tensor],
        written: Sequence[torch.Tensor] = (),
    ) -> CapturedGraph | None:
        """Captures some work; ``None`` if the guards of the other graphs have changed."""
        guards = Guards(phase)
        if self._guards_changed(phase, guards):
            return None
        held = [*guards.tensors, *self._lrs.tensors, *written, *self._static_tensors]
        try:
            graph = self.graphs.capture(kind, key, work, inputs, held)
            changed = Guards(phase).changed(guards)
        finally:
            guards.restore()  # what the capture has assigned is memory that no kernel has written
        if changed:
            self.invalidate(phase)
            raise RuntimeError(
                f"capture=True: {kind.name} of phase {phase.name!r} assigns something new to {', '.join(changed[:5])}, "
                "which a graph can't repeat. Change a tensor in place (copy_, lerp_, add_), turn a number into a tensor, and "
                "return by name from compute_loss what is only logged. The older weight_norm and spectral_norm of "
                "torch.nn.utils assign too: use those of torch.nn.utils.parametrizations"
            )
        self._guards = guards
        return graph

    def _check_cheap_guards(self, phase: PhaseLike, with_weights: bool) -> None:
        """Invalidates the graphs if gradients or weights are at other addresses, or are trained in another way."""
        moved = with_weights and self._guards is not None and self._guards.addresses_changed()
        if moved or addresses(self._static_tensors) != self._static_addresses:
            self.invalidate(phase, "a parameter or a gradient has moved, a parameter was frozen, or a module changed its mode")

    def check_guards(self, phase: PhaseLike) -> None:
        """Invalidates the graphs if anything that they rely on has changed."""
        if self._guards is not None:
            self._guards_changed(phase, Guards(phase))

    def _guards_changed(self, phase: PhaseLike, now: Guards) -> bool:
        changed = now.changed(self._guards) if self._guards is not None else []
        if changed:
            self.invalidate(phase, f"of a change of {', '.join(changed[:3])}")
        return bool(changed)


def set_grads(phase: PhaseLike, grads: list[torch.Tensor | None]) -> None:
    """Assigns a gradient to each parameter of a phase."""
    for parameter, grad in zip(phase.parameters(), grads, strict=True):
        parameter.grad = grad
