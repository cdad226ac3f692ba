"""Tests for users: whether their training resumes exactly."""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events

from camshaft.engines.trainer import Trainer
from camshaft.models import plain_state_dict
from camshaft.pytree import tensors
from camshaft.validation import check_choice

__all__ = ["assert_resumes_exactly"]

MakeRun = Callable[[Path], tuple[Trainer, Callable[[], Any]]]


def assert_resumes_exactly(
    make_run: MakeRun,
    stops: Iterable[int] | None = None,
    *,
    by: str = "terminate",
    make_resumed: MakeRun | None = None,
) -> None:
    """Trains, stops, rebuilds, resumes, and compares bit by bit with an uninterrupted run.

    For each stop a new run is cut short after that iteration. Then everything is built again, resumed from the newest
    checkpoint and run to the end, and every batch, random state, loss, learning rate and weight is compared with those of the
    uninterrupted run, iteration by iteration.

    Args:
        make_run: called with a folder for checkpoints; seeds, builds model, data and trainer, attaches a
            ``CheckpointRotation`` over that folder, and returns ``(trainer, run)``. ``run()`` trains to the end.
        stops: the iterations after which to stop; by default every iteration but the last.
        by: how the run is stopped: by ``"terminate"``, which saves once more, or by an ``"exception"`` after everything else
            in that iteration, which saves nothing, like a kill. Then the resumed run begins at the last checkpoint, or at
            the start if there is none.
        make_resumed: makes the resumed run if it must differ in something that should not matter, such as the number of
            workers; by default ``make_run``.

    Raises:
        AssertionError: names the first difference: which batch, random generator, loss, learning rate or weight, at
            which iteration.
        ValueError: if the trainer has no ``CheckpointRotation``, or ``by`` is unknown.

    Example:
        >>> from camshaft import CheckpointRotation, create_trainer, seed_everything
        >>> data = [(torch.randn(4, 8), torch.randn(4, 1))] * 4
        >>> def make_run(folder):
        ...     seed_everything(0)
        ...     model = torch.nn.Sequential(torch.nn.Linear(8, 1), torch.nn.Dropout())
        ...     trainer = create_trainer(model, torch.optim.Adam(model.parameters()), torch.nn.functional.mse_loss)
        ...     CheckpointRotation(folder).attach(trainer)
        ...     return trainer, lambda: trainer.run(data, max_epochs=2)
        >>> assert_resumes_exactly(make_run, stops=[1, 4, 5])
    """
    check_choice(by, "by", ("terminate", "exception"))
    with tempfile.TemporaryDirectory() as folder:
        full, end = _record(*make_run(Path(folder)))
    for stop in range(1, len(full)) if stops is None else stops:
        with tempfile.TemporaryDirectory() as folder:
            _stop_early(*make_run(Path(folder)), stop, by)
            trainer, run = (make_resumed or make_run)(Path(folder))
            _resume(trainer, must_exist=by == "terminate")
            resumed, resumed_end = _record(trainer, run)
        context = f"stopped after iteration {stop} and resumed"
        first = stop + 1 if by == "terminate" else min(resumed, default=stop + 1)
        _compare_traces({k: v for k, v in full.items() if k >= first}, resumed, context)
        _compare(end, resumed_end, context, "at the end")


class _Stopped(Exception):
    """Stops a run in the middle."""


def _stop_early(trainer: Trainer, run: Callable[[], Any], stop: int, by: str) -> None:
    """Runs until an iteration has ended."""

    def stop_run(engine: Trainer) -> None:
        if by == "exception":
            raise _Stopped
        engine.terminate()

    trainer.add_event_handler_at(2001, Events.ITERATION_COMPLETED(once=stop), stop_run)
    with suppress(_Stopped):
        run()


def _resume(trainer: Trainer, must_exist: bool) -> None:
    """Resumes from the newest checkpoint; one must exist after a run that was terminated."""
    rotation = next((h for h in trainer.handlers.values() if hasattr(h, "resume")), None)
    if rotation is None:
        raise ValueError("make_run must attach a CheckpointRotation over the folder that it is given")
    if rotation.resume("auto") is not None:
        random.seed()  # nothing may depend on the seeds before the run
        np.random.seed()
        torch.manual_seed(random.getrandbits(32))
    elif must_exist:
        raise AssertionError("the stopped run left no checkpoint to resume from")


Trace = dict[int, dict[str, Any]]


def _record(trainer: Trainer, run: Callable[[], Any]) -> tuple[Trace, dict[str, Any]]:
    """Runs to the end, and records everything that a resumed run must reproduce: for each iteration, and at the end."""
    trace: Trace = {}

    def record_batch(engine: Trainer) -> None:
        batch = [_checksum(tensor) for tensor in tensors(engine.state.batch)]
        trace[engine.state.iteration] = {"batch": batch, "random state": _random_states()}

    def record_step(engine: Trainer) -> None:
        trace[engine.state.iteration] |= _step_record(engine)

    trainer.add_event_handler_at(-2000, Events.ITERATION_STARTED, record_batch)
    trainer.add_event_handler_at(2000, Events.ITERATION_COMPLETED, record_step)
    run()
    end = trainer.checkpoint()
    end["handlers"] = {k: v for k, v in end["handlers"].items() if v}
    for entry in ("data", "metrics"):  # the data position is compared batch by batch
        end.pop(entry)
    return trace, _checksums(end)


def _step_record(engine: Trainer) -> dict[str, Any]:
    """The loss, learning rates, weights, gradients and random states after an iteration."""
    record: dict[str, Any] = {"loss": _checksum(engine.state.loss)}
    for name, phase in engine.phases.items():
        record |= {f"learning rate {key}": rate for key, rate in engine.learning_rates(name)}
        record |= {f"weight {key} of {name}": _checksum(value) for key, value in plain_state_dict(phase.module).items()}
        record[f"gradients of {name}"] = [None if p.grad is None else _checksum(p.grad) for p in phase.parameters()]
    record["random state after the step"] = _random_states()
    return record


def _random_states() -> list[int]:
    """Checksums of the states of the global random generators."""
    python = zlib.crc32(repr(random.getstate()).encode())
    numpy = zlib.crc32(repr([np.asarray(part).tolist() for part in list(np.random.get_state())[1:]]).encode())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [python, numpy, _checksum(torch.get_rng_state()), *map(_checksum, cuda)]


def _checksum(tensor: Any) -> int:
    """A checksum of a tensor's bits."""
    if not isinstance(tensor, torch.Tensor):
        return zlib.crc32(repr(tensor).encode())
    content = tensor.detach().cpu().contiguous()
    if content.dtype == torch.bfloat16:
        content = content.view(torch.int16)
    return zlib.crc32(content.numpy().tobytes(), zlib.crc32(repr(tuple(tensor.shape)).encode()))


def _checksums(value: Any) -> Any:
    """A nest with a checksum instead of each tensor."""
    if isinstance(value, torch.Tensor):
        return {"tensor": _checksum(value)}
    if isinstance(value, Mapping):
        return {key: _checksums(item) for key, item in value.items()}
    return [_checksums(item) for item in value] if isinstance(value, (list, tuple)) else value


def _compare_traces(full: Trace, resumed: Trace, context: str) -> None:
    """Raises ``AssertionError`` at the first difference between two runs."""
    if list(full) != list(resumed):
        raise AssertionError(f"{context}: it ran the iterations {_span(resumed)}, the uninterrupted run {_span(full)}")
    for iteration, seen in full.items():
        for name, value in seen.items():
            if resumed[iteration].get(name) != value:
                raise AssertionError(f"{context}: the first difference is the {name}, at iteration {iteration}")


def _span(trace: Mapping[int, Any]) -> str:
    return f"{min(trace)} to {max(trace)}" if trace else "none"


def _compare(one: Any, other: Any, context: str, path: str) -> None:
    """Raises ``AssertionError`` at the first difference between two nests."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        for key in one:
            _compare(one[key], other[key], context, f"{path}, {key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            _compare(left, right, context, f"{path}[{number}]")
    elif one != other and not (one != one and other != other):  # NaN equals NaN here
        raise AssertionError(f"{context}: {path} is {other!r:.80}, the uninterrupted run has {one!r:.80}")
