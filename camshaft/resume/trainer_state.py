"""What a checkpoint holds of a trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from camshaft.distributed.collectives import world_size
from camshaft.distributed.dtensors import full_tensor
from camshaft.models import is_sharded
from camshaft.pytree import map_tensors
from camshaft.resume.data_position import length_of
from camshaft.resume.metric_state import metric_states
from camshaft.resume.ranks import all_rank_states, rank_state
from camshaft.resume.rollback import all_or_nothing
from camshaft.rng import rng_state
from camshaft.serialization import pack

__all__ = ["load_trainer_state", "trainer_state_dict"]

FORMAT = 1
"""The version of the format."""

CLOCKS = ("iteration", "epoch", "epoch_length", "max_epochs", "max_iters", "epoch_is_open")
"""The fields of the trainer's state that are saved and restored."""


def trainer_state_dict(trainer: Any, sharded: bool = False) -> dict[str, Any]:
    """Everything that a resumed run needs.

    Args:
        trainer: the trainer.
        sharded: leaves tensors that are sharded over the processes as they are; otherwise they are gathered.

    Returns:
        A dict that ``torch.load(weights_only=True)`` can read, for :func:`load_trainer_state`. Its tensors are the live ones.

    Raises:
        TypeError: if there is something that a checkpoint can't carry; names it.
    """
    state, loaded = trainer.state, trainer.run_state.checkpoint  # loaded but not run yet: its data position still counts
    own = {
        "handlers": {name: handler.state_dict() for name, handler in trainer.handlers.items()},
        "losses": plain_values(state.losses),
        "batch": followers_batch(trainer),
        "epoch_metrics": metric_states(trainer),
        "rng": rng_state() if loaded is None else loaded["rng"],
        "data": position_state(trainer) if loaded is None else loaded["data"],
    }
    content: dict[str, Any] = {
        "format": FORMAT,
        "clocks": {
            **{name: getattr(state, name) for name in CLOCKS},
            "epoch_iteration": trainer.epoch_iteration,
            "length_is_learned": trainer.run_state.length_is_learned,
            "stop_reason": state.stop_reason,
        },
        "phases": {name: phase.state_dict() for name, phase in trainer.phases.items()},
        "metrics": plain_values(state.metrics),
    }
    if world_size() > 1:
        content["ranks"] = all_rank_states(trainer, own)
    packed: dict[str, Any] = pack(content | own, "the checkpoint")
    if not sharded and any(is_sharded(phase.module) for phase in trainer.phases.values()):
        packed = map_tensors(full_tensor, packed)
    return packed


def load_trainer_state(trainer: Any, content: Mapping[str, Any]) -> None:
    """Restores the state in which :func:`trainer_state_dict` was called; the next run continues from there.

    Args:
        trainer: the trainer.
        content: the result of :func:`trainer_state_dict`.

    Raises:
        ValueError: if it belongs to another model, optimizer or scheme. After any error the trainer is unchanged.
    """
    if content.get("format") != FORMAT:
        raise ValueError(f"the file is not a checkpoint of this package's format {FORMAT}: format {content.get('format')!r}")
    content = rank_state(content)
    if list(content["phases"]) != list(trainer.phases):
        raise ValueError(f"the checkpoint has the phases {list(content['phases'])}, this trainer {list(trainer.phases)}")
    for name, phase in trainer.phases.items():
        phase.check_state_dict(content["phases"][name])
    with all_or_nothing(trainer):
        load_handlers(trainer, content["handlers"])
        for name, phase in trainer.phases.items():
            phase.load_state_dict(content["phases"][name])
        load_clocks(trainer, content)
    trainer.run_state.loaded(content)


def load_clocks(trainer: Any, content: Mapping[str, Any]) -> None:
    """Restores what ``trainer.state`` shows, and forgets an earlier run's data."""
    clocks, state = content["clocks"], trainer.state
    for name in CLOCKS:
        setattr(state, name, clocks[name])
    trainer.epoch_iteration = clocks["epoch_iteration"]
    trainer.run_state.length_is_learned = clocks["length_is_learned"]
    main = list(trainer.phases.values())[-1]
    state.optimizer_step, state.skipped_steps = main.optimizer_step, main.skipped_steps
    state.metrics.recall(content["metrics"])
    state.losses = dict(content["losses"])
    trainer.last_batch, state.x, state.y = content["batch"], None, None
    trainer.should_terminate = trainer.should_terminate_single_epoch = False
    trainer._internal_run_generator = trainer._dataloader_iter = trainer._init_iter = None


def load_handlers(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Restores each attached handler, keeps the states of others for handlers attached later, and warns about both."""
    for name, handler in trainer.handlers.items():
        if name in saved:
            handler.load_state_dict(saved[name])
    added = [name for name in trainer.handlers if name not in saved]
    removed = [name for name, state in saved.items() if name not in trainer.handlers and state]
    trainer.unclaimed = {name: saved[name] for name in removed}
    if added or removed:
        kinds = (
            (added, "new since:", "a new one starts from scratch"),
            (removed, "gone:", "one that is gone is restored if it is attached before run()"),
        )
        parts = "; ".join(f"{text} {', '.join(names)}" for names, text, _ in kinds if names)
        effects = ", and ".join(effect for names, _, effect in kinds if names)
        warnings.warn(f"resume: the handlers are not those of the checkpoint ({parts}); {effects}", stacklevel=4)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a mapping that are numbers or tensors."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float, torch.Tensor))}


def followers_batch(trainer: Any) -> Any:
    """The last batch, if data of unknown length may end here and the followers will need it for their turn."""
    if not trainer.followers or not trainer.primary.window_is_open or trainer.state.epoch_length is not None:
        return None
    try:
        return pack(trainer.last_batch, "the batch")
    except TypeError:
        return None


def position_state(trainer: Any) -> dict[str, Any]:
    """What a checkpoint holds of the data."""
    state: dict[str, Any] = trainer.data_position.state_dict(trainer.state.iteration, is_data_exhausted(trainer))
    return state


def is_data_exhausted(trainer: Any) -> bool:
    """Whether the present iteration over the data has returned all of its batches."""
    state, taken = trainer.state, trainer.data_position.taken(trainer.state.iteration)
    length = length_of(state.dataloader)
    if length is None and trainer.coordinator.is_distributed:  # an epoch ends with the data of rank 0
        return bool(trainer.data_position.is_exhausted)
    if length is None and trainer.run_state.length_is_learned:
        length = state.epoch_length
    return length is not None and taken >= length
