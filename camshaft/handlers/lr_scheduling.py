"""Learning-rate schedules: per optimizer step, per epoch, or on a metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, Listener, on
from camshaft.metrics import MetricWatch, as_number
from camshaft.validation import describe_type

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LRScheduling", "check_every"]


class LRScheduling(Handler):
    """Steps a learning-rate scheduler after each optimizer step, after each epoch, or with each new value of a metric.

    An optimizer step that the scaler or a handler skips does not advance the schedule. The scheduler is saved in every
    checkpoint.

    Args:
        scheduler: any torch scheduler, or an object with ``optimizer``, ``step()`` and ``state_dict()`` like one.
        every: ``"step"`` (each completed optimizer step) or ``"epoch"``.
        metric: a name in ``state.metrics``: the scheduler is stepped with each new value (``ReduceLROnPlateau``); ``every`` is
            ignored then.

    Raises:
        TypeError: if the scheduler is not a scheduler.
        ValueError: if ``every`` is unknown, a plateau scheduler has no metric, or the optimizer is not the trainer's.

    Example:
        >>> import torch
        >>> from camshaft import create_trainer
        >>> model = torch.nn.Linear(8, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trainer = create_trainer(model, optimizer, torch.nn.functional.mse_loss)
        >>> plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        >>> schedule = LRScheduling(plateau, metric="val/loss").attach(trainer)
    """

    saved = ("scheduler",)
    needs_trainer = True

    def __init__(self, scheduler: Any, *, every: str = "step", metric: str | None = None) -> None:
        for attribute in ("step", "state_dict", "load_state_dict", "optimizer"):
            if not hasattr(scheduler, attribute):
                raise TypeError(
                    f"scheduler must be a torch.optim.lr_scheduler, got {describe_type(scheduler)}"
                    + ("" if isinstance(scheduler, type) else f" without {attribute!r}")
                )
        check_every(every)
        if metric is None and is_plateau(scheduler):
            raise ValueError(
                f"{type(scheduler).__name__} follows a metric: attach LRScheduling(scheduler, metric='val/loss') instead of "
                "passing it as scheduler="
            )
        self.scheduler, self.every = scheduler, every
        self.watch = None if metric is None else MetricWatch(metric, "LRScheduling")
        self.phase = ""

    def attach(self, engine: Any, name: str | None = None) -> Self:
        """Attaches it as :meth:`Handler.attach` does; a scheduler can be attached only once, under any name.

        Raises:
            ValueError: if the scheduler is attached already, or its optimizer is not the trainer's.
        """
        others = [item for item in getattr(engine, "handlers", {}).values() if isinstance(item, LRScheduling)]
        if any(item.scheduler is self.scheduler for item in others if item is not self):
            raise ValueError(
                f"scheduler {type(self.scheduler).__name__} is attached already: it would be stepped twice. Pass it as "
                "scheduler=, or attach LRScheduling(scheduler), but not both"
            )
        return super().attach(engine, name)

    def on_attach(self, engine: Any) -> None:
        """Finds the phase of the scheduler's optimizer."""
        owners = [phase.name for phase in engine.phases.values() if self.scheduler.optimizer in phase.optimizers]
        if not owners:
            raise ValueError(
                f"scheduler {type(self.scheduler).__name__} was made for another optimizer than the trainer's; "
                "make it from the optimizer that you train with"
            )
        self.phase = owners[0]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the scheduler.

        Raises:
            TypeError: if something that is a number in a scheduler of torch is none in ``state``.
        """
        if type(self.scheduler).__module__ == "torch.optim.lr_scheduler":
            for key, own in self.scheduler.state_dict().items():
                if type(own) in (int, float) and key in state["scheduler"]:
                    as_number(state["scheduler"][key], f"scheduler.{key}")
        super().load_state_dict(state)

    def listeners(self) -> Iterator[Listener]:
        """Yields the events at which the scheduler is stepped."""
        yield from super().listeners()
        if self.watch is not None:
            fresh = Events.ITERATION_COMPLETED(self._when_new) | Events.EPOCH_COMPLETED(self._when_new)
            yield Listener(fresh, self.step_on_metric, Priority.SCHEDULE_BY_METRIC)
            yield Listener(Events.EPOCH_COMPLETED, self.step_on_late_metric, Priority.SCHEDULE)
            yield Listener(Events.COMPLETED, self.check_at_end, Priority.SAVE + 2)
        elif self.every == "epoch":
            yield Listener(Events.EPOCH_COMPLETED, self.step, Priority.SCHEDULE)
        else:
            yield Listener(StepEvents.OPTIMIZER_STEP_COMPLETED, self.step_in_phase, Priority.SCHEDULE)

    @on(Events.STARTED)
    def start(self, engine: Any) -> None:
        """Ignores the metric of an earlier run."""
        if self.watch is not None:
            self.watch.start(engine)

    def step_in_phase(self, engine: Any) -> None:
        """Steps the scheduler after an optimizer step of its phase."""
        if engine.state.phase != self.phase:
            return
        if counts_itself(self.scheduler):
            self.scheduler.step()
        else:
            self.scheduler.step_update(engine.state.optimizer_step)

    def step(self, engine: Any) -> None:
        """Steps the scheduler after an epoch."""
        if counts_itself(self.scheduler):
            self.scheduler.step()
        else:
            self.scheduler.step(engine.state.epoch)

    def step_on_metric(self, engine: Any) -> None:
        """Steps the scheduler with a new value of the metric."""
        assert self.watch is not None
        self.scheduler.step(self.watch.take(engine))

    def step_on_late_metric(self, engine: Any) -> None:
        """Does the same for a metric that a user's handler, or an Ignite metric, writes at the end of the epoch."""
        assert self.watch is not None
        if self.watch.is_new(engine):
            self.step_on_metric(engine)
        else:
            self.watch.check_exists(engine)

    def check_at_end(self, engine: Any) -> None:
        """Raises ``ValueError`` if the metric has never appeared."""
        assert self.watch is not None
        self.watch.check_at_end(engine)

    def _when_new(self, engine: Any, _: int) -> bool:
        return self.watch is not None and self.watch.is_new(engine)

    def describe(self) -> str:
        """Its name and the scheduler's class."""
        return f"{super().describe()}({type(self.scheduler).__name__})"


def check_every(every: Any) -> None:
    """Raises ``ValueError`` if ``every`` is neither ``"step"`` nor ``"epoch"``."""
    if every not in ("step", "epoch"):
        raise ValueError(f"schedule_every must be 'step' or 'epoch', got {every!r}")


def counts_itself(scheduler: Any) -> bool:
    """Whether a scheduler counts its steps, as torch's do; timm's get the number of the step or the epoch."""
    return not hasattr(scheduler, "step_update")


def is_plateau(scheduler: Any) -> bool:
    """Whether the scheduler's ``step`` needs a metric."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    return isinstance(scheduler, ReduceLROnPlateau)
