"""Training curves, metrics, images and hyperparameters in TensorBoard, with the optimizer step as their axis."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from camshaft.distributed.collectives import is_main_process, world_size
from camshaft.distributed.dtensors import local_tensor
from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, Listener, on
from camshaft.points import Point, as_numbers, flatten_metrics, sum_over_ranks
from camshaft.pytree import num_samples
from camshaft.readback import Readback
from camshaft.tensorboard_tags import CYCLE, ENDED, finished, layout
from camshaft.validation import check_count

__all__ = ["TensorBoard"]

MAX_BUFFERED_LOSSES = 256
"""The number of losses that are kept before they are summed on the device."""
FLUSH_AFTER_SECONDS = 1.0
"""The time for which points are buffered: waking the writer's thread for each would cost more than the point."""
MAX_BUFFERED_TENSORS = 4096
"""The number of buffered tensors at which they are written immediately."""
MAX_AGE_SECONDS = 10
"""The maximum age of what a browser shows."""


class TensorBoard(Handler):
    """Writes the curves of a run for TensorBoard. The x-axis of every curve is the optimizer step.

    Every ``every`` optimizer steps it writes a point of these curves:

    - ``train/loss``: the mean since the last point.
    - ``train/<name>``: each named loss of ``compute_loss`` or of a GAN.
    - ``train/lr``, or ``train/lr/<group>`` with several parameter groups: the rate that the step used.
    - ``train/grad_norm``, if it is measured: the latest.
    - ``train/samples_per_second``: the speed of training, without evaluation.

    New values in ``state.metrics`` are written under their names when they appear. Values stay on the device; the points of
    about one second are copied to the host in one transfer, and written when they have arrived: no step waits for them. A
    resumed run continues in the same folder. With several processes rank 0 writes the losses and samples of all ranks; a value
    that only some ranks have is averaged over those.

    Args:
        log_dir: the folder of this run.
        every: the number of optimizer steps between two points.
        hparams: hyperparameters, written with the final metrics for the HParams tab.
        images: called as ``images(engine)`` whenever metrics are written; returns ``{tag: tensor}`` of shape (3, H, W) or
            (1, H, W) with values in 0 to 1, or a batch (N, C, H, W).
        histograms: writes histograms of weights and gradients with the metrics.

    Raises:
        ValueError: if ``every`` is not a positive integer.
        TypeError: if ``images`` is not callable or ``hparams`` is not a mapping of plain values.

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
        if images is not None and not callable(images):
            raise TypeError(f"images must be a function of the engine, got {images!r}")
        for name, value in (hparams or {}).items():
            if not isinstance(value, (bool, int, float, str)):
                raise TypeError(f"hparams[{name!r}] must be a number, text or bool, got {type(value).__name__}")
        self.log_dir, self.every = os.fspath(log_dir), check_count(every, "every")
        self.images, self.histograms = images, histograms
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
        self._readings: deque[tuple[list[Point], float, Readback]] = deque()

    def listeners(self) -> Iterator[Listener]:
        """Yields the events of the points and of new metrics."""
        yield from super().listeners()
        at = StepEvents.OPTIMIZER_STEP_COMPLETED(every=self.every)
        yield Listener(at, self.write_scalars, Priority.HISTORY)  # before a schedule changes the rate
        fresh = Events.ITERATION_COMPLETED(self._when_metrics_are_new) | Events.EPOCH_COMPLETED | Events.COMPLETED
        yield Listener(fresh, self.write_metrics, Priority.LOG)

    def on_attach(self, engine: Any) -> None:
        """Opens the file immediately if a run is in progress."""
        if engine.is_running:
            self.open(engine)

    @on(Events.STARTED, priority=Priority.LOG)
    def open(self, engine: Any) -> None:
        """Opens the run's event file; a resumed run hides the points after the step from which it resumes."""
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
        self._samples = 0
        self._restart_clock()
        if not is_main_process():
            return
        purge_step = state.optimizer_step + 1 if resumed else None
        self.writer = SummaryWriter(self.log_dir, purge_step=purge_step, flush_secs=MAX_AGE_SECONDS)
        self._is_laid_out = False
        self.writer.add_text(CYCLE, "```\n" + engine.explain() + "\n```", state.optimizer_step)

    @on(Events.EPOCH_STARTED)
    def start_clock(self, engine: Any) -> None:
        """Starts the clock of the rate, which counts training only."""
        self._since = time.perf_counter()

    @on(Events.EPOCH_COMPLETED, priority=Priority.HISTORY)
    def stop_clock(self, engine: Any) -> None:
        """Stops the clock of the rate during evaluation."""
        self._seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()
        self._flush_points()

    @on(StepEvents.BACKWARD_COMPLETED, priority=Priority.LOG)
    def gather(self, engine: Any) -> None:
        """Keeps the loss of this batch, on the device."""
        state = engine.state
        if state.phase == self._main:
            self._losses.append(state.loss)
            self._batches += 1
            if len(self._losses) >= MAX_BUFFERED_LOSSES:
                self._losses = [torch.stack(self._losses).sum()]
        if state.phase == engine.primary.name:
            self._samples += num_samples(state.batch) or 0
        if self._readings:
            self._write_readings()

    def write_scalars(self, engine: Any) -> None:
        """Buffers one point of each training curve, and writes the buffered points if it is time."""
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
            point = sum_over_ranks(point, named, engine.phases[state.phase].device)
        if self.writer is None:
            return
        self._points.append(point)
        self._held += len(losses) + len(values)
        if self._held >= MAX_BUFFERED_TENSORS or self._seconds + time.perf_counter() - self._since >= FLUSH_AFTER_SECONDS:
            self._read_points()
            self._write_readings()

    def _flush_points(self) -> None:
        """Writes all buffered points; waits for the device."""
        self._read_points()
        self._write_readings(wait=True)

    def _read_points(self) -> None:
        """Starts to copy the buffered points to the host, in one transfer."""
        points, self._points, self._held = self._points, [], 0
        if points:
            values = [value for point in points for value in (*point.losses, point.samples, *point.values.values())]
            self._readings.append((points, self._samples * self._world, Readback(values)))
            self._samples = 0

    def _write_readings(self, wait: bool = False) -> None:
        """Writes the points that have arrived on the host, in order."""
        while self._readings and (wait or self._readings[0][2].is_ready()):
            self._write_points(*self._readings.popleft())

    def _write_points(self, points: list[Point], samples: float, readback: Readback) -> None:
        numbers = iter(readback.floats())
        self._seconds += time.perf_counter() - self._since  # the device has come so far, so this is the true rate
        rows = [[next(numbers) for _ in range(len(point.losses) + 1 + len(point.values))] for point in points]
        samples += sum(row[len(point.losses)] for point, row in zip(points, rows, strict=True))
        rate = {"train/samples_per_second": samples / self._seconds} if samples and self._seconds > 0 else {}
        for point, row in zip(points, rows, strict=True):
            count = len(point.losses)
            mean = {"train/loss": sum(row[:count]) / point.batches} if count else {}
            self._write(mean | dict(zip(point.values, row[count + 1 :], strict=True)) | rate, point.step, point.time)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since, self._seconds = time.perf_counter(), 0.0

    def _write(self, values: Mapping[str, float], step: int, when: float | None = None) -> None:
        """Writes one event with all values, which takes a tenth of the time of one event for each."""
        entries = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.writer.file_writer.add_summary(self._summary(value=entries), step, when)

    def _when_metrics_are_new(self, engine: Any, _: int) -> bool:
        return bool(engine.state.metrics.version != self._version)

    def write_metrics(self, engine: Any) -> None:
        """Writes new metrics, with images and histograms."""
        state = engine.state
        if not self._when_metrics_are_new(engine, 0):
            return
        self._version = state.metrics.version
        images = {} if self.images is None else self.images(engine)  # on every rank: running the model may need all of them
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
        """Writes the layout of the charts once per run, when the names of the metrics are known."""
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
        """Writes why the run ended and the hyperparameters with the final metrics, and closes the file."""
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
        """Writes everything to disk, because the run may end here."""
        if self.writer is None:
            return
        self._flush_points()
        self.writer.flush()
        if engine.should_terminate == "skip_completed":  # COMPLETED will not fire
            self._write_ending(engine)
            self.close()

    def _write_ending(self, engine: Any, error: BaseException | None = None) -> None:
        state = engine.state
        reason = state.stop_reason or finished(state.epoch, state.iteration, state.max_iters)
        self.writer.add_text(ENDED, reason if error is None else f"{type(error).__name__}: {error}", state.optimizer_step)

    @on(Events.EXCEPTION_RAISED)
    def on_exception(self, engine: Any, error: BaseException) -> None:
        """Writes the exception, and closes the file; another run opens a new one."""
        if self.writer is not None:
            self._write_ending(engine, error)
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The losses since the last point; writes earlier points to disk before the checkpoint."""
        if self.writer is not None:
            self._flush_points()
            self.writer.flush()
        return {"losses": torch.stack(self._losses) if self._losses else None, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the losses since the last point, on the device of the model.

        Raises:
            ValueError: if they are not one number per batch, or their count is not an integer of at least 0.
        """
        device = None if self.engine is None else list(self.engine.phases.values())[-1].device
        losses = state["losses"]
        if losses is not None and losses.ndim != 1:
            raise ValueError(f"TensorBoard.losses must have one dimension, got the shape {tuple(losses.shape)}")
        self._batches = check_count(state["batches"], "TensorBoard.batches", minimum=0)
        self._losses = [] if losses is None else list(losses.to(device))

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
