"""Freezes parameters until an epoch or a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from camshaft.distributed.collectives import world_size
from camshaft.events import Events, StepEvents
from camshaft.handler import Handler, on
from camshaft.models import ddp_wrapper, freeze, matching, unfreeze
from camshaft.validation import check_optional_count

__all__ = ["FreezeParameters"]


class FreezeParameters(Handler):
    """Freezes the parameters whose names match, and unfreezes them at an epoch or an optimizer step.

    It freezes them when it is attached, and unfreezes them when it is detached. Frozen parameters have no gradient, so neither
    momentum nor weight decay changes them, even if the optimizer has them. DDP needs ``find_unused_parameters=True``.

    Args:
        patterns: ``fnmatch`` patterns over parameter names, such as ``"encoder.*"``.
        until_epoch: the first epoch in which they are trained; by default never.
        until_step: the first optimizer step that trains them, instead.
        phase: the phase of the model; by default the first.

    Raises:
        ValueError: if a number is not positive; at ``attach``, if a pattern matches nothing, or DDP would wait for the
            gradients of frozen parameters.

    Example:
        >>> frozen = FreezeParameters("encoder.*", until_epoch=3)
    """

    changes = ("weights",)

    def __init__(
        self, *patterns: str, until_epoch: int | None = None, until_step: int | None = None, phase: str | None = None
    ) -> None:
        if until_epoch is not None and until_step is not None:
            raise ValueError("until_epoch and until_step exclude each other; give only one of them")
        until_epoch = check_optional_count(until_epoch, "until_epoch")
        until_step = check_optional_count(until_step, "until_step")
        self.patterns, self.until_epoch, self.until_step, self.phase = patterns, until_epoch, until_step, phase
        self._frozen: tuple[str, ...] = ()

    def on_attach(self, engine: Any) -> None:
        """Freezes the parameters; those that were frozen before stay frozen."""
        self._phase = engine.phases_named(self.phase)[0]
        found = matching(self._phase.module, self.patterns)
        if world_size() > 1 and not self._phase.reduced_by_hand:
            check_reduction(ddp_wrapper(self._phase.module), found)
        trainable = {name for name, parameter in found.items() if parameter.requires_grad}
        freeze(self._phase.module, *self.patterns)
        self._frozen = tuple(sorted(trainable))

    def on_detach(self, engine: Any) -> None:
        """Unfreezes the parameters."""
        self._release()

    @on(Events.STARTED | Events.EPOCH_STARTED | StepEvents.OPTIMIZER_STEP_COMPLETED)
    def unfreeze_if_due(self, engine: Any) -> None:
        """Unfreezes the parameters at their epoch or step."""
        if not self._frozen:
            return
        state = engine.state
        epoch = state.epoch + state.epoch_is_open if engine.last_event_name == Events.STARTED else state.epoch
        if self.until_epoch is not None and epoch >= self.until_epoch:
            self._release()
        if self.until_step is not None and self._phase.optimizer_step + 1 >= self.until_step:
            self._release()

    def _release(self) -> None:
        if self._frozen:
            unfreeze(self._phase.module, *(name.translate(LITERAL) for name in self._frozen))
        self._frozen = ()


def check_reduction(wrapper: Any, found: Mapping[str, nn.Parameter]) -> None:
    """Checks that DDP, which chooses the gradients to reduce when it is made, supports parameters that are unfrozen later.

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
            f"FreezeParameters: DistributedDataParallel waits for the gradients of {', '.join(trained[:3])}, which would be "
            "frozen; make it with DistributedDataParallel(model, find_unused_parameters=True), and without static_graph. To "
            "freeze them permanently, call freeze(model, ...) before you wrap it"
        )


LITERAL = str.maketrans({"[": "[[]", "*": "[*]", "?": "[?]"})
"""Escapes a name for use as an fnmatch pattern."""
