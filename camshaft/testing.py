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
            ``CheckpointRotation`` over that folder, and returns ``(trainer, run)``, where ``run()`` trains to the end.
        stops: the iterations after which to stop; by default each one but the last.
        by: how the run is cut short: by ``"terminate"``, which saves once more, or by an ``"exception"`` after everything else
            in that iteration, which writes nothing, like a kill: the resumed run begins at the last checkpoint, or afresh.
        make_resumed: makes the resumed run if it is to differ in something that mustn't matter, such as the number of
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
        whole, end = _trace(make_run, Path(folder))
    for stop in range(1, len(whole)) if stops is None else stops:
        with tempfile.TemporaryDirectory() as folder:
            with suppress(_CutShort):
                _trace(make_run, Path(folder), stop=stop, by=by)
            resumed, resumed_end = _trace(make_resumed or make_run, Path(folder), resume=by)
        where = f"stopped after iteration {stop} and resumed"
        first = stop + 1 if by == "terminate" else min(resumed, default=stop + 1)
        _compare_traces({k: v for k, v in whole.items() if k >= first}, resumed, where)
        _compare(end, resumed_end, where, "at the end")


class _CutShort(Exception):
    """Cuts a run short in the middle."""


def _cut_short(engine: Trainer) -> None:
    raise _CutShort


def _terminate(engine: Trainer) -> None:
    engine.terminate()


def _trace(
    make_run: MakeRun, folder: Path, stop: int | None = None, by: str = "", resume: str = ""
) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Runs once, and records for each iteration everything that a resumed run must reproduce."""
    trainer, run = make_run(folder)
    trace: dict[int, dict[str, Any]] = {}

    def note_batch(engine: Trainer) -> None:
        trace[engine.state.iteration] = {"batch": [_sum(t) for t in tensors(engine.state.batch)], "random state": _random()}

    def note_step(engine: Trainer) -> None:
        seen = trace[engine.state.iteration]
        seen["loss"] = _sum(engine.state.loss)
        for name, phase in engine.phases.items():
            seen |= {f"learning rate {key}": rate for key, rate in engine.learning_rates(name)}
            seen |= {f"weight {key} of {name}": _sum(p) for key, p in plain_state_dict(phase.module).items()}
            seen[f"gradients of {name}"] = [None if p.grad is None else _sum(p.grad) for p in phase.parameters()]
        seen["random state after the step"] = _random()

    trainer.add_event_handler_at(-2000, Events.ITERATION_STARTED, note_batch)
    trainer.add_event_handler_at(2000, Events.ITERATION_COMPLETED, note_step)
    if stop is not None:
        stop_run = _cut_short if by == "exception" else _terminate
        trainer.add_event_handler_at(2001, Events.ITERATION_COMPLETED(once=stop), stop_run)
    if resume:
        rotation = next((h for h in trainer.handlers.values() if hasattr(h, "resume")), None)
        if rotation is None:
            raise ValueError("make_run must attach a CheckpointRotation over the folder that it is given")
        if rotation.resume("auto") is not None:
            random.seed()  # nothing may depend on the seeds before the run
            np.random.seed()
            torch.manual_seed(random.getrandbits(32))
        elif resume == "terminate":
            raise AssertionError("the stopped run left no checkpoint to resume from")
    run()
    end = trainer.checkpoint()
    end["handlers"] = {k: v for k, v in end["handlers"].items() if v}
    for entry in ("data", "metrics"):  # the data position is compared batch by batch
        end.pop(entry)
    return trace, _frozen(end)


def _random() -> list[int]:
    python = zlib.crc32(repr(random.getstate()).encode())
    numpy = zlib.crc32(repr([np.asarray(part).tolist() for part in list(np.random.get_state())[1:]]).encode())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [python, numpy, _sum(torch.get_rng_state()), *map(_sum, cuda)]


def _sum(tensor: Any) -> int:
    """A checksum of a tensor's bits."""
    if not isinstance(tensor, torch.Tensor):
        return zlib.crc32(repr(tensor).encode())
    content = tensor.detach().cpu().contiguous()
    if content.dtype == torch.bfloat16:
        content = content.view(torch.int16)
    return zlib.crc32(content.numpy().tobytes(), zlib.crc32(repr(tuple(tensor.shape)).encode()))


def _frozen(value: Any) -> Any:
    """A nest with checksums in place of tensors."""
    if isinstance(value, torch.Tensor):
        return {"tensor": _sum(value)}
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return [_frozen(item) for item in value] if isinstance(value, (list, tuple)) else value


def _compare_traces(whole: dict[int, dict[str, Any]], resumed: dict[int, dict[str, Any]], where: str) -> None:
    if list(whole) != list(resumed):
        raise AssertionError(f"{where}: it ran the iterations {_span(resumed)}, the uninterrupted run {_span(whole)}")
    for iteration, seen in whole.items():
        for name, value in seen.items():
            if resumed[iteration].get(name) != value:
                raise AssertionError(f"{where}: the first thing that differs is the {name}, at iteration {iteration}")


def _span(trace: Mapping[int, Any]) -> str:
    return f"{min(trace)} to {max(trace)}" if trace else "none"


def _compare(one: Any, other: Any, where: str, path: str) -> None:
    """Raises ``AssertionError`` at the first difference between two nests."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        for key in one:
            _compare(one[key], other[key], where, f"{path}, {key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            _compare(left, right, where, f"{path}[{number}]")
    elif one != other and not (one != one and other != other):  # NaN equals NaN here
        raise AssertionError(f"{where}: {path} is {other!r:.80}, the uninterrupted run has {one!r:.80}")
