"""Evaluation during training, without side effects on training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from ignite.engine import Engine

from camshaft.distributed.collectives import world_size
from camshaft.events import Events, Priority, split
from camshaft.handler import Handler, Listener, on
from camshaft.models import preserve_training_mode
from camshaft.rng import preserve_rng_state

__all__ = ["Evaluation"]


class Evaluation(Handler):
    """Runs an evaluator over data and puts its metrics into the trainer's ``state.metrics`` as ``"<prefix>/<metric>"``.

    It does not affect training: the training flag of every submodule and the state of every random generator are restored
    afterwards. At the end of a run it runs once more if the weights have changed since the last evaluation.

    Args:
        evaluator: an engine with metrics, from :func:`create_evaluator` or any Ignite engine.
        data: the data of the evaluation.
        every: the event or events on which it runs.
        prefix: the prefix of the metrics' names.
        ema: an ``ExponentialMovingAverage`` whose averaged weights are used while the evaluator runs.

    Raises:
        TypeError: if ``evaluator`` is not an engine, ``every`` is not an event, or ``data`` can't be iterated over repeatedly.
        ValueError: if it is attached to its own evaluator.

    Example:
        >>> import torch
        >>> from ignite.metrics import Accuracy
        >>> from camshaft import create_evaluator, create_trainer
        >>> model = torch.nn.Linear(8, 3)
        >>> data = [(torch.randn(4, 8), torch.randint(3, (4,)))] * 2
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.cross_entropy)
        >>> evaluator = create_evaluator(model, metrics={"accuracy": Accuracy()})
        >>> evaluation = Evaluation(evaluator, data, every=Events.ITERATION_COMPLETED(every=2)).attach(trainer)
        >>> list(trainer.run(data).metrics)
        ['val/accuracy']
    """

    def __init__(
        self,
        evaluator: Engine,
        data: Any,
        *,
        every: Any = Events.EPOCH_COMPLETED,
        prefix: str = "val",
        ema: Any = None,
    ) -> None:
        if not isinstance(evaluator, Engine):
            raise TypeError(f"evaluator must be an Ignite engine, got {type(evaluator).__name__}")
        if not hasattr(data, "__iter__"):
            raise TypeError(f"data must be batches that can be iterated over, got {type(data).__name__}")
        if isinstance(data, Iterator):
            raise TypeError(f"data must be batches that can be iterated over again and again, got {type(data).__name__}")
        if not isinstance(prefix, str) or not prefix:
            raise TypeError(f"prefix must be a name such as 'val', got {prefix!r}")
        if ema is not None and not hasattr(ema, "swapped_in"):
            raise TypeError(f"ema must be an ExponentialMovingAverage, got {type(ema).__name__}")
        self.every, self.ema = split(every), ema
        self.evaluator, self.data, self.prefix = evaluator, data, prefix
        self.provides = f"{prefix}/"
        self.has_run = False
        self.evaluated_at: int | None = None

    def default_name(self) -> str:
        """The class's name and the prefix."""
        return f"Evaluation/{self.prefix}"

    def on_attach(self, engine: Any) -> None:
        """Checks that the engine is not the evaluator itself."""
        if engine is self.evaluator:
            raise ValueError(
                "Evaluation runs its evaluator in the middle of a trainer's run, so it can't be attached to that evaluator; "
                "attach it to the trainer: Evaluation(evaluator, data).attach(trainer)"
            )

    def listeners(self) -> Iterator[Listener]:
        """Yields the events in ``every``, before the handlers that use the results."""
        yield from super().listeners()
        for event in self.every:
            yield Listener(event, self.evaluate, Priority.EVALUATE)

    @on(Events.STARTED)
    def start(self, engine: Any) -> None:
        """Resets the record of the last evaluation."""
        self.evaluated_at = None

    def evaluate(self, engine: Any) -> None:
        """Runs the evaluator, and copies its metrics to the trainer."""
        modules = [phase.module for phase in getattr(engine, "phases", {}).values()]
        averaged = nullcontext() if self.ema is None else self.ema.swapped_in()
        with preserve_training_mode(*modules), preserve_rng_state(), averaged:
            try:
                self.evaluator.run(self.data)
            except Exception:
                if getattr(engine, "ending", None) is None or world_size() > 1:
                    raise
                return  # the signal that ends the run has ended the loader's workers first
        self.has_run = True
        self.evaluated_at = self._clock(engine)
        for name, value in self.evaluator.state.metrics.items():
            engine.state.metrics[f"{self.prefix}/{name}"] = value

    @on(Events.COMPLETED, priority=Priority.EVALUATE)
    def finish(self, engine: Any) -> None:
        """Evaluates the final weights if they have not been evaluated; early stopping ignores the result."""
        if self.evaluated_at != self._clock(engine) and engine.state.iteration > 0:
            self.evaluate(engine)

    @staticmethod
    def _clock(engine: Any) -> int:
        return int(getattr(engine.state, "optimizer_step", engine.state.iteration))
