"""Scenarios of progress bars and TensorBoard on several ranks."""

import io
import os
from typing import Any

import torch
from scenarios import OUTPUT, ddp, loader, loss_without_class_zero, plain_model, rank, scenario, trainer_of
from torch import nn

from camshaft import CheckpointRotation, Events, Progress, TensorBoard


@scenario()
def files_and_bars_of_each_rank() -> dict[str, Any]:
    folder = OUTPUT / "written"
    trainer = trainer_of(ddp(plain_model()))
    TensorBoard(folder / "tensorboard", every=2).attach(trainer)
    Progress(file=(stream := io.StringIO()), every_seconds=0).attach(trainer)
    checkpoints = CheckpointRotation(folder / "checkpoints", keep_last=2).attach(trainer)
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.loss)))
    trainer.run(loader(), max_epochs=2)
    return {"losses": losses, "bar": len(stream.getvalue()), "last": str(checkpoints.last), "pid": os.getpid()}


class NamedLosses:
    """Named losses in another order on each rank, and one that rank 1 alone returns, from its third batch on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        loss = loss_without_class_zero(model, batch)
        self.calls += 1
        zero = loss.detach() * 0
        if rank() == 0:
            return {"loss": loss, "one": zero + 1, "two": zero + 2}
        extra = {"extra": zero + 5} if self.calls > 2 else {}
        return {"loss": loss, "two": zero + 4, **extra, "one": zero + 1}


@scenario()
def losses_of_different_names() -> int:
    trainer = trainer_of(ddp(plain_model()), compute_loss=NamedLosses())
    TensorBoard(OUTPUT / "named losses", every=1).attach(trainer)
    return trainer.run(loader()).optimizer_step
