"""Parameters that stay frozen until an epoch or a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from camshaft.distributed.collectives import world_size
from camshaft.events import Events, StepEvents
from camshaft.handler import Handler, on
from camshaft.models import ddp_wrapper, freeze, matching, unfreeze

__all__ = ["FreezeParameters"]


class FreezeParameters(Handler):
    """Freezes the parameters whose names match, and lets them train again when their time has come.

    Frozen parameters have no gradient, so neither momentum nor weight decay moves them, though the optimizer holds them.
    Under DDP make it with ``find_unused_parameters=True``.

    Args:
        patterns: ``fnmatch`` patterns over parameter names, such as ``"encoder.*"``.
        until_epoch: the first epoch in which they train; by default never.
        until_step: the first optimizer step that trains them, instead.
        phase: the phase whose model is meant; the first by default.

    Raises:
        ValueError: if a number isn't positive, or at ``attach`` where a pattern matches nothing, or a
            ``DistributedDataParallel`` would wait for the gradients of what is frozen.

    Example:
        >>> frozen = FreezeParameters("encoder.*", until_epoch=3)
    """

    changes = ("weights",)

    def __init__(
        self, *patterns: str, until_epoch: int | None = None, until_step: int | None = None, phase: str | None = None
    ) -> None:
        if until_epoch is not None and until_step is not None:
            raise ValueError("until_epoch and until_step exclude each other; give only one of them")
        for name, value in (("until_epoch", until_epoch), ("until_step", until_step)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.patterns, self.until_epoch, self.until_step, self.phase = patterns, until_epoch, until_step, phase
        self._held: tuple[str, ...] = ()

    def on_attach(self, engine: Any) -> None:
        """Freezes them; those that were frozen before stay so for good."""
        self._phase = engine.phases_named(self.phase)[0]
        found = matching(self._phase.module, self.patterns)
        if world_size() > 1 and not self._phase.reduced_by_hand:
            check_reduction(ddp_wrapper(self._phase.module), found)
        trainable = {name for name, parameter in found.items() if parameter.requires_grad}
        freeze(self._phase.module, *self.patterns)
        self._held = tuple(sorted(trainable))

    def on_detach(self, engine: Any) -> None:
        """Lets them train again."""
        self._release()

    @on(Events.STARTED | Events.EPOCH_STARTED | StepEvents.OPTIMIZER_STEP_COMPLETED)
    def look_at_the_clock(self, engine: Any) -> None:
        """Lets them train again when their time has come."""
        if not self._held:
            return
        state = engine.state
        epoch = state.epoch + state.epoch_is_open if engine.last_event_name == Events.STARTED else state.epoch
        if self.until_epoch is not None and epoch >= self.until_epoch:
            self._release()
        if self.until_step is not None and self._phase.optimizer_step + 1 >= self.until_step:
            self._release()

    def _release(self) -> None:
        if self._held:
            unfreeze(self._phase.module, *(name.translate(LITERAL) for name in self._held))
        self._held = ()


def check_reduction(wrapper: Any, found: Mapping[str, nn.Parameter]) -> None:
    """Sees that DDP, which settles at its making what travels, can do with parameters that stop training or begin to.

    Args:
        wrapper: the ``DistributedDataParallel``, if there is one.
        found: the parameters to be frozen, by name.

    Raises:
        ValueError: says how to wrap the model.
    """
    trained = [name for name, parameter in found.items() if parameter.requires_grad]
    if wrapper is None or not trained:
        return
    if wrapper.static_graph or not wrapper.find_unused_parameters:
        raise ValueError(
            f"FreezeParameters: DistributedDataParallel waits for the gradients of {', '.join(trained[:3])}, which are to be "
            "frozen; make it with DistributedDataParallel(model, find_unused_parameters=True), and without static_graph. For "
            "good, freeze(model, ...) before you wrap it"
        )


LITERAL = str.maketrans({"[": "[[]", "*": "[*]", "?": "[?]"})
"""Makes an fnmatch pattern of a name that may hold its special characters."""
