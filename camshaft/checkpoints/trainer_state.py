"""What a checkpoint holds of a trainer, and how a trainer is set back to it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from camshaft.checkpoints.data_position import length_of
from camshaft.checkpoints.metric_state import metric_states
from camshaft.distributed.collectives import all_gather_object, rank, world_size
from camshaft.distributed.dtensors import full_tensor
from camshaft.models import is_sharded
from camshaft.pytree import map_tensors
from camshaft.rng import preserve_rng_state, reseed, restore_rng, rng_state
from camshaft.serialization import pack

if TYPE_CHECKING:
    from camshaft.engines.trainer import Trainer

__all__ = ["prepare_resume", "restore", "starts_new_run", "trainer_state_dict"]

logger = logging.getLogger("camshaft")

FORMAT = 1
"""The version of what a checkpoint holds."""


def trainer_state_dict(trainer: Trainer, sharded: bool = False) -> dict[str, Any]:
    """What :meth:`Trainer.checkpoint` gives.

    Args:
        trainer: the trainer.
        sharded: leaves tensors that are split over the processes as they are; otherwise they are brought together.

    Returns:
        A dict that ``torch.load(weights_only=True)`` can read back; :meth:`restore` takes it. Its tensors are the live ones.

    Raises:
        TypeError: names whatever a checkpoint can't carry.
    """
    state, waiting = trainer.state, trainer._restored  # restored, and not run since: the data stands where it stood
    content = {
        "format": FORMAT,
        "clocks": {
            "iteration": state.iteration,
            "epoch": state.epoch,
            "epoch_length": state.epoch_length,
            "max_epochs": state.max_epochs,
            "max_iters": state.max_iters,
            "epoch_iteration": trainer.epoch_iteration,
            "epoch_is_open": state.epoch_is_open,
            "length_is_learned": trainer.length_is_learned,
            "stop_reason": state.stop_reason,
        },
        "phases": {name: phase.state_dict() for name, phase in trainer.phases.items()},
        "metrics": {name: value for name, value in state.metrics.items() if isinstance(value, (int, float, torch.Tensor))},
    }
    own = {
        "handlers": {name: handler.state_dict() for name, handler in trainer.handlers.items()},
        "losses": {name: value for name, value in state.losses.items() if isinstance(value, (int, float, torch.Tensor))},
        "batch": last_batch(trainer),
        "epoch_metrics": metric_states(trainer),
        "rng": rng_state() if waiting is None else waiting["rng"],
        "data": trainer.data_position.state_dict(state.iteration, is_data_exhausted(trainer))
        if waiting is None
        else waiting["data"],
    }
    if world_size() > 1:
        content["ranks"] = every_ranks(trainer, own)
    content |= own
    packed: dict[str, Any] = pack(content, "the checkpoint")
    if not sharded and any(is_sharded(phase.module) for phase in trainer.phases.values()):
        packed = map_tensors(full_tensor, packed)
    return packed


def every_ranks(trainer: Trainer, own: Mapping[str, Any]) -> list[Any]:
    """What is another on each process, of all of them."""
    differ = {name: own["handlers"][name] for name, handler in trainer.handlers.items() if handler.differs_by_rank}
    part = map_tensors(lambda tensor: tensor.detach().cpu(), pack({**own, "handlers": differ}, "the checkpoint"))
    return all_gather_object(part)


def restore(trainer: Trainer, content: Mapping[str, Any]) -> None:
    """What :meth:`Trainer.restore` does.

    Args:
        content: what :meth:`checkpoint` gave.

    Raises:
        ValueError: where it belongs to another model, optimizer or scheme; nothing has been changed then.
    """
    if content.get("format") != FORMAT:
        raise ValueError(f"the file isn't a checkpoint of this package's format {FORMAT}: format {content.get('format')!r}")
    content = rank_state(content)
    if list(content["phases"]) != list(trainer.phases):
        raise ValueError(f"the checkpoint has the phases {list(content['phases'])}, this trainer {list(trainer.phases)}")
    for name, phase in trainer.phases.items():
        phase.check_state_dict(content["phases"][name])
    for name, phase in trainer.phases.items():
        phase.load_state_dict(content["phases"][name])
    restore_handlers(trainer, content["handlers"])
    clocks, state = content["clocks"], trainer.state
    for name in ("iteration", "epoch", "epoch_length", "max_epochs", "max_iters", "epoch_is_open"):
        setattr(state, name, clocks[name])
    trainer.epoch_iteration = clocks["epoch_iteration"]
    trainer.length_is_learned = clocks["length_is_learned"]
    main = list(trainer.phases.values())[-1]
    state.optimizer_step, state.skipped_steps = main.optimizer_step, main.skipped_steps
    state.metrics.recall(content["metrics"])
    state.losses = dict(content["losses"])
    trainer.last_batch, state.x, state.y = content["batch"], None, None
    trainer.should_terminate = trainer.should_terminate_single_epoch = False
    trainer._internal_run_generator = trainer._dataloader_iter = trainer._init_iter = None
    trainer._restored = content


def rank_state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint as it is for this process: of as many as there were when it was written, each has its own part."""
    ranks, processes = content.get("ranks", [content]), world_size()
    part = ranks[rank() % len(ranks)]
    own = {**content, **part, "handlers": {**content["handlers"], **part["handlers"]}}
    return own if len(ranks) == processes else reshard_state(own, len(ranks), processes)


def reshard_state(content: dict[str, Any], before: int, now: int) -> dict[str, Any]:
    """A checkpoint for another number of processes: as many samples have been taken, by other hands.

    Args:
        content: the part of one process.
        before: how many processes wrote it.
        now: how many go on.
    """
    warnings.warn(
        f"resume: the checkpoint was written by {before} processes and {now} go on: weights, optimizers and clocks are exact, "
        "the place in the data is that of as many samples, and random numbers are others from here on",
        stacklevel=5,
    )
    phases = {name: {key: part for key, part in phase.items() if key != "window"} for name, phase in content["phases"].items()}
    if rank() >= before:  # two processes must not draw the same numbers
        with preserve_rng_state():
            restore_rng(content["rng"])
            reseed(int(torch.randint(2**31, ()).item()) + rank())
            content = {**content, "rng": rng_state()}
    return {**content, "data": dict(content["data"]), "phases": phases, "processes": (before, now)}


def last_batch(trainer: Trainer) -> Any:
    """The last batch, where data of unknown length may end here and the open window's followers will ask for it."""
    if not trainer.followers or not trainer.primary.window_is_open or trainer.state.epoch_length is not None:
        return None
    try:
        return pack(trainer.last_batch, "the batch")
    except TypeError:
        return None


def restore_handlers(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Gives each attached handler its state, keeps the others' for those that come before the run, and warns of both."""
    for name, handler in trainer.handlers.items():
        if name in saved:
            handler.load_state_dict(saved[name])
    added = [name for name, handler in trainer.handlers.items() if name not in saved]
    removed = [name for name, state in saved.items() if name not in trainer.handlers and state]
    trainer.unclaimed = {name: saved[name] for name in removed}
    if added or removed:
        parts = [f"{text} {', '.join(names)}" for text, names in (("new since:", added), ("gone:", removed)) if names]
        warnings.warn(
            f"resume: the handlers are not those of the checkpoint ({'; '.join(parts)}); the new ones start afresh, and one "
            "that is gone goes on after all if it is attached before run()",
            stacklevel=3,
        )


def position_state(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint holds of the data."""
    return trainer.data_position.state_dict(trainer.state.iteration, is_data_exhausted(trainer))


def is_data_exhausted(trainer: Trainer) -> bool:
    """Whether the present pass over the data has given all that it has."""
    state, taken = trainer.state, trainer.data_position.taken(trainer.state.iteration)
    length = length_of(state.dataloader)
    if length is None and trainer.coordinator is not None:  # a process may have more data than others, with which an epoch ends
        return trainer.data_position.is_exhausted
    if length is None and trainer.length_is_learned:
        length = state.epoch_length
    return length is not None and taken >= length


def rescale_position(trainer: Trainer, restored: Mapping[str, Any], data: Any) -> None:
    """The place in the data and the first clock, where other processes share an epoch's batches in another way."""
    (before, now), state, place = restored["processes"], trainer.state, restored["data"]
    old, new = place["length"], length_of(data)
    ratio = (new, old) if old and new else (before, now)
    whole_epochs = state.epoch - state.epoch_is_open
    trainer.epoch_iteration = trainer.epoch_iteration * ratio[0] // ratio[1] if state.epoch_is_open else 0
    place["length"] = None
    if "taken" in place:
        place["taken"] = place["taken"] * ratio[0] // ratio[1]
    if state.epoch_length is not None:
        state.epoch_length = max(1, state.epoch_length * ratio[0] // ratio[1])
        state.iteration = whole_epochs * state.epoch_length + trainer.epoch_iteration


def nothing_to_do(state: Any) -> tuple[str, ...]:
    """What is said of a run whose end has been reached before, and the ways out."""
    if state.max_iters is None:
        done, limit, reset = f"{state.epoch} of {state.max_epochs} epochs", "max_epochs", "max_epochs"
    else:
        done, limit = f"{state.iteration} of {state.max_iters} iterations", "max_iters"
        reset = "max_epochs = trainer.state.max_iters"
    text = "nothing to do: %s are done; raise %s, use another folder, or set trainer.state.%s = None for a run of its own"
    return text, done, limit, reset


def starts_new_run(trainer: Trainer) -> bool:
    """Whether a trainer that was set back is to make a run of its own, which Ignite is told by limits that are ``None``."""
    state = trainer.state
    return trainer._restored is not None and state.iteration > 0 and state.max_epochs is None and state.max_iters is None


def prepare_resume(
    trainer: Trainer, restored: Mapping[str, Any], data: Any, max_epochs: int | None, max_iters: int | None
) -> bool:
    """Takes the limits of a resumed run over, and says whether they are reached already."""
    if max_epochs is not None and max_iters is not None:
        raise ValueError("max_epochs and max_iters exclude each other; give only one of them")
    if "processes" in restored:
        rescale_position(trainer, restored, data)
    before, now = restored["data"]["length"], length_of(data)
    if before is not None and now is not None and before != now:
        raise ValueError(
            f"the data has {now} batches, the checkpoint was written with {before}: the run can't go on exactly. Use the "
            "same data and batch size, or start a new run from its weights"
        )
    state = trainer.state
    if max_epochs is not None or max_iters is not None:
        state.max_epochs, state.max_iters = max_epochs, max_iters
    if state.max_epochs is None and state.max_iters is None:
        state.max_epochs = 1
    if trainer._is_done(state):
        logger.warning(*nothing_to_do(state))
        return True
    if state.epoch_is_open:
        state.epoch -= 1  # Ignite counts it again
    return False
