"""What a phase asks of its objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from camshaft.validation import name_of

__all__ = ["FunctionObjective", "Objective", "as_objective"]


class Objective:
    """Computes the loss of a batch: called as ``objective(engine, prepared)``.

    It returns a scalar tensor, or a mapping with ``"loss"``. The attributes have defaults for what the objective does not know.
    """

    label: str = "objective"
    """How error messages call it, e.g. ``"loss_fn cross_entropy"``."""
    loss_fn: Any = None
    """The user's loss function; if it is a module with a state, that state is saved with the phase."""
    has_penalties: bool = False
    """Whether the loss contains gradients of the network."""
    can_be_captured: bool = False
    """Whether ``create_trainer(capture=True)`` is for it."""
    non_blocking: bool | None = None
    """Whether it copies batches with ``non_blocking``; ``None`` if the phase does."""

    def __call__(self, engine: Any, prepared: Any) -> Any:
        raise NotImplementedError

    def inputs(self, state: Any) -> Sequence[Any] | None:
        """The arguments of the last call of the network, from ``trainer.state``; ``None`` if only the objective knows them."""
        return None


class FunctionObjective(Objective):
    """An objective that is a user's function of ``(engine, prepared)``.

    Args:
        function: the function; if it is a module with a state, that state is saved with the phase.
    """

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.loss_fn = function
        self.label = name_of(function)

    def __call__(self, engine: Any, prepared: Any) -> Any:
        return self.loss_fn(engine, prepared)


def as_objective(objective: Callable[[Any, Any], Any]) -> Objective:
    """An objective as it is, or a user's function as an objective."""
    return objective if isinstance(objective, Objective) else FunctionObjective(objective)
