"""Scenarios of ``save_weights`` and ``load_weights`` on several ranks."""

from typing import Any

import torch
from scenarios import (
    OUTPUT,
    ddp,
    error_of,
    from_rank_zero,
    fsdp,
    fully_shard,
    have_equal_weights,
    loader,
    plain_model,
    rank,
    scenario,
    shifted_model,
    trainer_of,
)
from torch import nn

from camshaft import CheckpointRotation, load_weights, save_weights


@scenario()
def weights_of_a_sharded_model() -> Any:
    """Loaded into a plain and into a sharded model."""
    source, path = fsdp(plain_model()), OUTPUT / "weights" / "sharded.pt"
    save_weights(source, path)
    content = torch.load(path, weights_only=True)
    plain, sharded = shifted_model(), fully_shard(shifted_model())
    load_weights(plain, path)
    load_weights(sharded, path)
    return {
        "types": sorted({type(value).__name__ for value in content.values()}),
        "plain": have_equal_weights(plain, source),
        "sharded": have_equal_weights(sharded, source),
    }


@scenario()
def weights_from_checkpoints() -> Any:
    """Loaded into a plain and into a sharded model, from a sharded and from a full checkpoint under FSDP2."""
    are_equal = {}
    for kind in ("sharded", "full"):
        model = fsdp(plain_model())
        trainer = trainer_of(model)
        checkpoints = CheckpointRotation(OUTPUT / f"{kind} checkpoints", sharded=kind == "sharded").attach(trainer)
        trainer.run(loader())
        plain, sharded = shifted_model(), fully_shard(shifted_model())
        load_weights(plain, checkpoints.last)
        load_weights(sharded, checkpoints.last)
        are_equal[kind] = have_equal_weights(plain, model), have_equal_weights(sharded, model)
    return are_equal


@scenario()
def weights_that_cannot_be_loaded_or_saved() -> Any:
    """A file that does not exist on rank 1, a folder that cannot be made, and another model."""
    path = OUTPUT / "weights.pt"
    save_weights(ddp(plain_model()), path)
    from_rank_zero(None)
    (OUTPUT / "a file").write_text("")
    return {
        "missing": error_of(lambda: load_weights(fsdp(plain_model()), path if rank() == 0 else OUTPUT / "missing.pt")),
        "no folder": error_of(lambda: save_weights(fsdp(plain_model()), OUTPUT / "a file" / "weights.pt")),
        "another model": error_of(lambda: load_weights(fully_shard(nn.Linear(2, 2)), path)),
    }


@scenario()
def files_of_weights_under_ddp() -> Any:
    """Each rank gives another file name."""
    save_weights(ddp(plain_model()), OUTPUT / f"by-{rank()}.pt")
    from_rank_zero(None)
    return sorted(path.name for path in OUTPUT.glob("by-*.pt"))
