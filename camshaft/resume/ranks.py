"""The parts of a checkpoint that differ between ranks, and how another number of ranks resumes from them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from camshaft.distributed.collectives import all_gather_object, rank, world_size
from camshaft.pytree import map_tensors
from camshaft.resume.data_position import length_of
from camshaft.rng import preserve_rng_state, reseed, restore_rng, rng_state
from camshaft.serialization import pack

__all__ = ["all_rank_states", "rank_state", "rescale_position"]


def all_rank_states(trainer: Any, own: Mapping[str, Any]) -> list[Any]:
    """The parts of a checkpoint that differ between ranks, of all ranks."""
    differing = {name: own["handlers"][name] for name, handler in trainer.handlers.items() if handler.differs_by_rank}
    part = map_tensors(lambda tensor: tensor.detach().cpu(), pack({**own, "handlers": differing}, "the checkpoint"))
    return all_gather_object(part)


def rank_state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint as this rank resumes from it, with its own part in place."""
    ranks, processes = content.get("ranks", [content]), world_size()
    part = ranks[rank() % len(ranks)]
    own = {**content, **part, "handlers": {**content["handlers"], **part["handlers"]}}
    return own if len(ranks) == processes else reshard_state(own, len(ranks), processes)


def reshard_state(content: dict[str, Any], before: int, now: int) -> dict[str, Any]:
    """A checkpoint for another number of processes, with the data position after the same number of samples.

    Args:
        content: the part of one rank.
        before: the number of processes that have written it.
        now: the number of processes that resume.
    """
    warnings.warn(
        f"resume: the checkpoint was written by {before} processes and {now} resume: weights, optimizers and clocks are exact, "
        "the data position is that after the same number of samples, and random numbers differ from here on",
        stacklevel=5,
    )
    phases = {name: {key: part for key, part in phase.items() if key != "window"} for name, phase in content["phases"].items()}
    if rank() >= before:  # two processes must not draw the same numbers
        with preserve_rng_state():
            restore_rng(content["rng"])
            reseed(int(torch.randint(2**31, ()).item()) + rank())
            content = {**content, "rng": rng_state()}
    return {**content, "data": dict(content["data"]), "phases": phases, "processes": (before, now)}


def rescale_position(trainer: Any, checkpoint: Mapping[str, Any], data: Any) -> None:
    """Converts the data position and the iteration to another number of processes, which share an epoch differently."""
    (before, now), state, position = checkpoint["processes"], trainer.state, checkpoint["data"]
    old, new = position["length"], length_of(data)
    ratio = (new, old) if old and new else (before, now)
    completed_epochs = state.epoch - state.epoch_is_open
    trainer.epoch_iteration = trainer.epoch_iteration * ratio[0] // ratio[1] if state.epoch_is_open else 0
    position["length"] = None
    if "taken" in position:
        position["taken"] = position["taken"] * ratio[0] // ratio[1]
    if state.epoch_length is not None:
        state.epoch_length = max(1, state.epoch_length * ratio[0] // ratio[1])
        state.iteration = completed_epochs * state.epoch_length + trainer.epoch_iteration
