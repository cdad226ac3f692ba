"""Every learning rate that was ever used, by optimizer step."""

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

__all__ = ["LRHistory"]


class LRHistory(Handler):
    """Notes the learning rate that each completed optimizer step used; the notes survive a resume.

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
        """Needs a trainer's phases."""
        engine.phases_named(None)

    @on(Events.STARTED)
    def start(self, engine: Any) -> None:
        """A new run has notes of its own; a resumed one continues with them."""
        if engine.state.iteration == 0:
            self._steps, self._rates = {}, {}

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED, priority=Priority.HISTORY)
    def note(self, engine: Any) -> None:
        """Notes the rates before any schedule moves them."""
        state = engine.state
        for name, rate in engine.learning_rates(state.phase):
            if name not in self._steps:
                self._steps[name], self._rates[name] = array("q"), array("d")
            self._steps[name].append(state.optimizer_step)
            self._rates[name].append(rate)

    def state_dict(self) -> dict[str, Any]:
        """The notes as tensors."""
        return {
            name: [torch.tensor(steps, dtype=torch.int64), torch.tensor(self._rates[name], dtype=torch.float64)]
            for name, steps in self._steps.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a checkpoint's notes."""
        self._steps = {name: array("q", steps.tolist()) for name, (steps, _) in state.items()}
        self._rates = {name: array("d", rates.tolist()) for name, (_, rates) in state.items()}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the rates over the optimizer steps.

        Args:
            path: where to write the picture; its ending chooses the format.

        Returns:
            The matplotlib figure.

        Raises:
            ModuleNotFoundError: if matplotlib isn't installed.
        """
        return draw(self.history, path)

    @staticmethod
    def simulate(scheduler: Any, steps: int) -> dict[str, list[tuple[int, float]]]:
        """The rates that a scheduler would give, ahead of time; neither it nor its optimizer moves.

        Args:
            scheduler: any torch scheduler that needs no metric.
            steps: how many optimizer steps.

        Returns:
            The same mapping as ``history``.

        Raises:
            ValueError: if ``steps`` is no positive integer.
            TypeError: if ``scheduler`` is none, or follows a metric.

        Example:
            >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            >>> halving = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
            >>> LRHistory.simulate(halving, 4)
            {'lr': [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]}
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive integer, got {steps!r}")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or not hasattr(scheduler, "optimizer"):
            raise TypeError(f"scheduler must be a torch scheduler that needs no metric, got {type(scheduler).__name__}")
        twin = twin_of(scheduler)
        history: dict[str, list[tuple[int, float]]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the twin has no weights for an optimizer step to come first
            for step in range(1, steps + 1):
                for name, rate in group_rates([twin.optimizer]):
                    history.setdefault(name, []).append((step, rate))
                twin.step()
        return history


def twin_of(scheduler: Any) -> Any:
    """A copy of a scheduler over a copy of its optimizer that holds no weights."""
    optimizer = scheduler.optimizer
    groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        | {"params": [torch.zeros(1, requires_grad=True)]}
        for group in optimizer.param_groups
    ]
    twin_optimizer = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.0)
    for own, group in zip(twin_optimizer.param_groups, groups, strict=True):
        own.update(group)
    memo = {id(optimizer): twin_optimizer}
    return copy.deepcopy(scheduler, memo)


def draw(history: Mapping[str, Sequence[tuple[int, float]]], path: str | Path | None) -> Any:
    """A figure of learning rates over optimizer steps."""
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
