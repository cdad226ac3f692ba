"""Training curves, metrics, images and hyper-parameters for TensorBoard, against the optimizer step."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch

from camshaft.distributed.collectives import all_gather_object, all_reduce, all_reduce_max, is_main_process, world_size
from camshaft.distributed.dtensors import local_tensor
from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, Listener, on
from camshaft.pytree import num_samples
from camshaft.tensorboard_tags import CYCLE, ENDED, finished, layout

__all__ = ["TensorBoard"]

MAX_BUFFERED_LOSSES = 256
"""So many losses are kept one by one before they are summed up on the device."""
FLUSH_AFTER_SECONDS = 1.0
"""Points are handed to the file together, this long after the first: to wake its thread for each costs more than the point."""
MAX_BUFFERED_TENSORS = 4096
"""With so many tensors they are handed over at once."""
FLUSH_SECONDS = 10
"""How old what a browser shows may be."""


class Point(NamedTuple):
    """One point of every training curve, as it lies on the device until it is written."""

    step: int
    time: float
    losses: list[torch.Tensor]
    batches: int
    samples: Any
    values: dict[str, Any]


class TensorBoard(Handler):
    """Writes what people look at while a model trains. Every curve has the optimizer step as its axis.

    Scalars: ``train/loss`` (the mean since the last point), ``train/lr`` (the one that the step used; several groups as
    ``train/lr/<group>``), ``train/grad_norm`` if it is measured (the last), ``train/samples_per_second``, the entries of a
    mapping from ``compute_loss`` or a GAN as ``train/<name>``, and ``state.metrics`` under their names. What is shown is
    gathered on the device, and the points of about a second are fetched in one transfer and written together. A resumed run
    continues in the same folder. Of several processes the first writes, and losses and samples are those of all; an entry that
    only some of them have is averaged over these.

    Args:
        log_dir: the folder of this run.
        every: how many optimizer steps lie between two points.
        hparams: hyper-parameters, written together with the final metrics for the HParams tab.
        images: called as ``images(engine)`` whenever metrics are written; returns ``{tag: tensor}`` of shape (3, H, W) or
            (1, H, W) with values in 0 to 1, or a batch (N, C, H, W).
        histograms: writes histograms of weights and gradients with the metrics.

    Raises:
        ValueError: if ``every`` is no positive integer.
        TypeError: if ``images`` can't be called or ``hparams`` is no mapping of plain values.

    Example:
        >>> import tempfile
        >>> from camshaft import create_trainer
        >>> model = torch.nn.Linear(8, 1)
        >>> trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
        >>> board = TensorBoard(tempfile.mkdtemp(), every=1, hparams={"lr": 0.1}).attach(trainer)
        >>> _ = trainer.run([(torch.zeros(2, 8), torch.zeros(2, 1))] * 2)
    """

    differs_by_rank = True

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        every: int = 10,
        hparams: Mapping[str, Any] | None = None,
        images: Callable[[Any], Mapping[str, torch.Tensor]] | None = None,
        histograms: bool = False,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive integer (optimizer steps), got {every!r}")
        if images is not None and not callable(images):
            raise TypeError(f"images must be a function of the engine, got {images!r}")
        for name, value in (hparams or {}).items():
            if not isinstance(value, (bool, int, float, str)):
                raise TypeError(f"hparams[{name!r}] must be a number, text or bool, got {type(value).__name__}")
        self.log_dir, self.every, self.images, self.histograms = os.fspath(log_dir), every, images, histograms
        self.hparams = dict(hparams or {})
        self.writer: Any = None
        self._world = 1
        self._losses: list[torch.Tensor] = []
        self._batches = self._samples = 0
        self._since = self._seconds = 0.0
        self._version = 0
        self._is_laid_out = False
        self._points: list[Point] = []
        self._held = 0

    def listeners(self) -> Iterator[Listener]:
        """Gathers at each batch, writes every so many steps and whenever there are new metrics."""
        yield from super().listeners()
        at = StepEvents.OPTIMIZER_STEP_COMPLETED(every=self.every)
        yield Listener(at, self.write_scalars, Priority.HISTORY)  # before a schedule moves the rate
        fresh = Events.ITERATION_COMPLETED(self._when_metrics_are_new) | Events.EPOCH_COMPLETED | Events.COMPLETED
        yield Listener(fresh, self.write_metrics, Priority.LOG)

    def on_attach(self, engine: Any) -> None:
        """Opens the file at once where a run is under way."""
        if engine.is_running:
            self.open(engine)

    @on(Events.STARTED, priority=Priority.LOG)
    def open(self, engine: Any) -> None:
        """Opens the run's event file; a resumed run hides what came after the step that it resumes from."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self.close()
        state = engine.state
        self._world = world_size()
        resumed = state.iteration > 0
        self._main = list(engine.phases)[-1]
        self._version = state.metrics.version
        if not resumed:
            self._losses, self._batches = [], 0
        self._restart_clock()
        if not is_main_process():
            return
        purge_step = state.optimizer_step + 1 if resumed else None
        self.writer = SummaryWriter(self.log_dir, purge_step=purge_step, flush_secs=FLUSH_SECONDS)
        self._is_laid_out = False
        self.writer.add_text(CYCLE, "```\n" + engine.explain() + "\n```", state.optimizer_step)

    @on(Events.EPOCH_STARTED)
    def start_clock(self, engine: Any) -> None:
        """The rate counts the time of training alone."""
        self._since = time.perf_counter()

    @on(Events.EPOCH_COMPLETED, priority=Priority.HISTORY)
    def stop_clock(self, engine: Any) -> None:
        """Evaluation doesn't count."""
        self._seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()
        self._flush_points()

    @on(StepEvents.BACKWARD_COMPLETED, priority=Priority.LOG)
    def gather(self, engine: Any) -> None:
        """Keeps this batch's loss on the device."""
        state = engine.state
        if state.phase == self._main:
            self._losses.append(state.loss)
            self._batches += 1
            if len(self._losses) >= MAX_BUFFERED_LOSSES:
                self._losses = [torch.stack(self._losses).sum()]
        if state.phase == engine.primary.name:
            self._samples += num_samples(state.batch) or 0

    def write_scalars(self, engine: Any) -> None:
        """Notes one point of each training curve, and hands the points over if it is time."""
        state = engine.state
        if state.phase != self._main:
            return
        values: dict[str, Any] = {f"train/{name}": value for name, value in flatten_metrics(state.losses)}
        if state.grad_norm is not None:
            values["train/grad_norm"] = state.grad_norm
        for name in engine.phases:
            values |= {f"train/{key}": rate for key, rate in engine.learning_rates(name)}
        losses = self._losses if len(engine.phases) == 1 else []
        point = Point(state.optimizer_step, time.time(), losses, self._batches, self._samples, values)
        self._losses, self._batches, self._samples = [], 0, 0
        if self._world > 1:
            named = {f"train/{name}" for name, _ in flatten_metrics(state.losses)}
            point = self._summed(point, named, engine.phases[state.phase].device)
        if self.writer is None:
            return
        self._points.append(point)
        self._held += len(losses) + len(values)
        if self._held >= MAX_BUFFERED_TENSORS or self._seconds + time.perf_counter() - self._since >= FLUSH_AFTER_SECONDS:
            self._flush_points()

    def _summed(self, point: Point, named: set[str], device: torch.device) -> Point:
        """A point of all processes: losses and samples summed, named losses averaged, in one transfer from device to device.

        A name that some processes don't have is averaged over those that do.
        """
        names, is_everywhere = names_of_all(named)
        has = [name in named for name in names]
        own = [point.values[name] if here else 0.0 for name, here in zip(names, has, strict=True)]
        loss = torch.stack(point.losses).sum() if point.losses else 0.0
        parts = [loss, float(point.samples), *own, *([] if is_everywhere else map(float, has))]
        summed = torch.stack([torch.as_tensor(part).detach().to(device, torch.float64).reshape(()) for part in parts])
        all_reduce(summed)
        count = self._world if is_everywhere else summed[2 + len(names) :]
        means = (summed[2 : 2 + len(names)] / count).float()
        losses = [summed[0].float()] if point.losses else []
        values = point.values | dict(zip(names, means, strict=True))
        return point._replace(losses=losses, batches=point.batches * self._world, samples=summed[1], values=values)

    def _flush_points(self) -> None:
        """Fetches the points that are held in one transfer, and writes them."""
        points, self._points, self._held = self._points, [], 0
        if not points:
            return
        numbers = to_floats([value for point in points for value in (*point.losses, point.samples, *point.values.values())])
        self._seconds += time.perf_counter() - self._since  # the host has waited for the device: this is the true rate
        rows = [[next(numbers) for _ in range(len(point.losses) + 1 + len(point.values))] for point in points]
        samples = self._samples * self._world + sum(row[len(point.losses)] for point, row in zip(points, rows, strict=True))
        rate = {"train/samples_per_second": samples / self._seconds} if samples and self._seconds > 0 else {}
        for point, row in zip(points, rows, strict=True):
            count = len(point.losses)
            mean = {"train/loss": sum(row[:count]) / point.batches} if count else {}
            self._write(mean | dict(zip(point.values, row[count + 1 :], strict=True)) | rate, point.step, point.time)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._samples, self._since, self._seconds = 0, time.perf_counter(), 0.0

    def _write(self, values: Mapping[str, float], step: int, when: float | None = None) -> None:
        """One event with all values, which costs a tenth of a call for each."""
        entries = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.writer.file_writer.add_summary(self._summary(value=entries), step, when)

    def _when_metrics_are_new(self, engine: Any, _: int) -> bool:
        return bool(engine.state.metrics.version != self._version)

    def write_metrics(self, engine: Any) -> None:
        """Writes new metrics, and with them images and histograms."""
        state = engine.state
        if not self._when_metrics_are_new(engine, 0):
            return
        self._version = state.metrics.version
        images = {} if self.images is None else self.images(engine)  # every process makes them: it may take all to run a model
        if self.writer is None:
            return
        self._flush_points()
        numbers = as_numbers(state.metrics)
        self._write(numbers, state.optimizer_step)
        self._lay_out(engine, numbers)
        for tag, image in images.items():
            add = self.writer.add_images if image.dim() == 4 else self.writer.add_image
            add(tag, image, state.optimizer_step)
        if self.histograms:
            self._write_histograms(engine)

    def _lay_out(self, engine: Any, metrics: Iterable[str]) -> None:
        """Says once in a run which curves belong together, when the names of the metrics are known."""
        if not self._is_laid_out:
            self.writer.add_custom_scalars(layout(metrics, gradient_norm=engine.state.grad_norm is not None))
            self._is_laid_out = True

    def _write_histograms(self, engine: Any) -> None:
        step = engine.state.optimizer_step
        for phase in engine.phases.values():
            prefix = f"{phase.name}/" if len(engine.phases) > 1 else ""
            for name, parameter in phase.module.named_parameters():
                self.writer.add_histogram(f"{prefix}weights/{name}", local_tensor(parameter), step)
                if parameter.grad is not None and bool(local_tensor(parameter.grad).isfinite().all()):
                    self.writer.add_histogram(f"{prefix}gradients/{name}", local_tensor(parameter.grad), step)

    @on(Events.COMPLETED, priority=Priority.LOG + 1)
    def finish(self, engine: Any) -> None:
        """Writes why the run ended, and the hyper-parameters beside the final metrics, and closes the file."""
        if self.writer is None:
            return
        self._lay_out(engine, engine.state.metrics)
        self._write_ending(engine)
        if self.hparams:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(self.hparams, as_numbers(engine.state.metrics)):  # type: ignore[no-untyped-call]
                self.writer.file_writer.add_summary(summary)
        self.close()

    @on(Events.TERMINATE | Events.INTERRUPT)
    def flush(self, engine: Any) -> None:
        """Whatever ends the run, what has been noted is on the disk."""
        if self.writer is None:
            return
        self._flush_points()
        self.writer.flush()
        if engine.should_terminate == "skip_completed":  # nothing is to come
            self._write_ending(engine)
            self.close()

    def _write_ending(self, engine: Any, error: BaseException | None = None) -> None:
        state = engine.state
        reason = state.stop_reason or finished(state.epoch, state.iteration, state.max_iters)
        self.writer.add_text(ENDED, reason if error is None else f"{type(error).__name__}: {error}", state.optimizer_step)

    @on(Events.EXCEPTION_RAISED)
    def on_exception(self, engine: Any, error: BaseException) -> None:
        """Writes the exception, and closes the file; a further run opens another."""
        if self.writer is not None:
            self._write_ending(engine, error)
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The losses since the last point. What a checkpoint comes after is on the disk before it."""
        if self.writer is not None:
            self._flush_points()
            self.writer.flush()
        return {"losses": torch.stack(self._losses) if self._losses else None, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with the losses since the last point."""
        self._losses = [] if state["losses"] is None else list(state["losses"])
        self._batches = state["batches"]

    def on_detach(self, engine: Any) -> None:
        """Closes the file."""
        self.close()

    def close(self) -> None:
        """Closes the event file, if one is open."""
        if self.writer is None:
            return
        try:
            self._flush_points()
        finally:
            self.writer.close()
            self.writer = None


def names_of_all(names: set[str]) -> tuple[list[str], bool]:
    """The names that any process has, in one order for all of them, and whether every process has them all.

    The processes compare a number that is made of their names, and send these only if it differs.
    """
    own = sorted(names)
    print_of_own = int.from_bytes(blake2b("\n".join(own).encode(), digest_size=7).digest(), "big")
    largest, smallest = all_reduce_max([print_of_own, -print_of_own])
    if largest == -smallest:
        return own, True
    return sorted({name for part in all_gather_object(own) for name in part}), False


def flatten_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Metrics that are numbers, and the entries of those that are vectors or mappings of numbers."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flatten_metrics({f"{name}/{key}": item for key, item in value.items()})
        elif isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() > 1:
            yield from ((f"{name}/{number}", item) for number, item in enumerate(value))
        elif isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            yield name, value
        elif hasattr(value, "item") and getattr(value, "size", 0) == 1:  # a NumPy scalar
            yield name, float(value)
        else:
            warnings.warn(f"TensorBoard: the metric {name!r} is a {type(value).__name__}, which is no number", stacklevel=2)


def to_floats(values: Sequence[Any]) -> Iterator[float]:
    """The values as floats, in order; those on a device come in one transfer."""
    held = [value.detach() for value in values if isinstance(value, torch.Tensor)]
    if not held:
        return map(float, values)
    device = held[0].device
    if any(value.dtype != torch.float32 or value.dim() or value.device != device for value in held):
        held = [value.to(device, torch.float32).reshape(()) for value in held]
    numbers = iter(torch.stack(held).tolist())
    return iter([next(numbers) if isinstance(value, torch.Tensor) else float(value) for value in values])


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number in metrics by name."""
    found = dict(flatten_metrics(metrics))
    return dict(zip(found, to_floats(list(found.values())), strict=True))
