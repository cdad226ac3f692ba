"""The history of learning rates, by optimizer step."""

from __future__ import annotations

import copy
import warnings
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, on
from camshaft.optimizers import group_rates
from camshaft.validation import check_count

__all__ = ["LRHistory"]


class LRHistory(Handler):
    """Records the learning rate that each completed optimizer step used; a resumed run continues the record.

    Names are ``"lr"``; with several parameter groups ``"lr/<name or number>"``; with several phases
    ``"<phase>/lr"``. One entry takes 16 bytes.

    Example:
        >>> from camshaft import create_trainer
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
        >>> history = LRHistory().attach(trainer)
        >>> _ = trainer.run([(torch.zeros(2, 8), torch.zeros(2, 1))] * 2)
        >>> history.history
        {'lr': [(1, 0.1), (2, 0.1)]}
    """

    def __init__(self) -> None:
        self._steps: dict[str, array[int]] = {}
        self._rates: dict[str, array[float]] = {}

    @property
    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Name -> list of ``(optimizer_step, lr used by that step)``."""
        return {name: list(zip(steps, self._rates[name], strict=True)) for name, steps in self._steps.items()}

    def on_attach(self, engine: Any) -> None:
        """Checks that the engine is a trainer."""
        engine.phases_named(None)

    @on(Events.STARTED)
    def start(self, engine: Any) -> None:
        """Clears the record in a new run; a resumed run continues it."""
        if engine.state.iteration == 0:
            self._steps, self._rates = {}, {}

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED, priority=Priority.HISTORY)
    def record(self, engine: Any) -> None:
        """Records the rates before a schedule changes them."""
        state = engine.state
        for name, rate in engine.learning_rates(state.phase):
            if name not in self._steps:
                self._steps[name], self._rates[name] = array("q"), array("d")
            self._steps[name].append(state.optimizer_step)
            self._rates[name].append(rate)

    def state_dict(self) -> dict[str, Any]:
        """The record as tensors."""
        return {
            name: [torch.tensor(steps, dtype=torch.int64), torch.tensor(self._rates[name], dtype=torch.float64)]
            for name, steps in self._steps.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the record."""
        self._steps = {name: array("q", steps.tolist()) for name, (steps, _) in state.items()}
        self._rates = {name: array("d", rates.tolist()) for name, (_, rates) in state.items()}

    def plot(self, path: str | Path | None = None) -> Any:
        """Plots the rates over the optimizer steps.

        Args:
            path: the file to write the picture to; its suffix chooses the format.

        Returns:
            The matplotlib figure.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return draw(self.history, path)

    @staticmethod
    def simulate(scheduler: Any, steps: int) -> dict[str, list[tuple[int, float]]]:
        """Computes the rates of a scheduler ahead of time, without changing it or its optimizer.

        Args:
            scheduler: any torch scheduler that needs no metric.
            steps: the number of optimizer steps.

        Returns:
            The same mapping as ``history``.

        Raises:
            ValueError: if ``steps`` is not a positive integer.
            TypeError: if ``scheduler`` is not a scheduler, or needs a metric.

        Example:
            >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            >>> halving = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
            >>> LRHistory.simulate(halving, 4)
            {'lr': [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]}
        """
        steps = check_count(steps, "steps")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or not hasattr(scheduler, "optimizer"):
            raise TypeError(f"scheduler must be a torch scheduler that needs no metric, got {type(scheduler).__name__}")
        scheduler_copy = copy_without_weights(scheduler)
        history: dict[str, list[tuple[int, float]]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the copy has no weights, and makes no optimizer steps
            for step in range(1, steps + 1):
                for name, rate in group_rates([scheduler_copy.optimizer]):
                    history.setdefault(name, []).append((step, rate))
                scheduler_copy.step()
        return history


def copy_without_weights(scheduler: Any) -> Any:
    """A copy of a scheduler, with a copy of its optimizer that has no weights."""
    optimizer = scheduler.optimizer
    groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        | {"params": [torch.zeros(1, requires_grad=True)]}
        for group in optimizer.param_groups
    ]
    optimizer_copy = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.0)
    for own, group in zip(optimizer_copy.param_groups, groups, strict=True):
        own.update(group)
    memo = {id(optimizer): optimizer_copy}
    return copy.deepcopy(scheduler, memo)


def draw(history: Mapping[str, Sequence[tuple[int, float]]], path: str | Path | None) -> Any:
    """Plots learning rates over optimizer steps."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plotting needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in history.items():
        axes.plot([step for step, _ in points], [rate for _, rate in points], label=name, drawstyle="steps-post")
    axes.set(xlabel="optimizer step", ylabel="learning rate")
    axes.grid(alpha=0.3)
    if len(history) > 1:
        axes.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
