"""More scenes: weights' files, evaluation, averages, curves and errors of one process alone."""

import signal
from typing import Any

import torch
from ignite.metrics import Loss
from scenes import (
    OUT,
    bare,
    error_of,
    furthest,
    iter_of,
    main,
    masked,
    rank,
    scene,
    sgd,
    sharded,
    shared,
    trainer_of,
    weights,
    world,
    wrapped,
)
from scenes import loader as batches_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import camshaft.checkpoints.sharded_save
import camshaft.distributed.failures
from camshaft import (
    R1,
    CheckpointRotation,
    Evaluation,
    Events,
    ExponentialMovingAverage,
    FreezeParameters,
    TensorBoard,
    create_evaluator,
    create_gan_trainer,
    gradient_penalty,
    load_weights,
    save_weights,
)
from camshaft.checkpoints.files import CheckpointError
from camshaft.cudagraphs.wrap import CudaGraphExecution
from camshaft.distributed.collectives import on_rank_zero
from camshaft.distributed.failures import Failures
from camshaft.engines.execution import EagerExecution


def other() -> nn.Module:
    model = bare()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    return furthest(weights(one), weights(two)) == 0.0


# -- files of weights -----------------------------------------------------------------------------------------------------


@scene
def weights_of_a_split_model() -> Any:
    """From a model under ``fully_shard`` into a whole one, and the other way."""
    source, path = sharded(), OUT / "split" / "weights.pt"
    save_weights(source, path)
    content = torch.load(path, weights_only=True)
    plain, split = other(), fully_shard(other())
    load_weights(plain, path)
    load_weights(split, path)
    return {
        "kinds": sorted({type(value).__name__ for value in content.values()}),
        "into a plain one": same(plain, source),
        "into a split one": same(split, source),
    }


@scene
def weights_of_checkpoints() -> Any:
    """Into a whole and a split model, from the folder and from the file of a trainer under ``fully_shard``."""
    found = {}
    for kind in ("folder", "file"):
        model = sharded()
        trainer = trainer_of(model)
        checkpoints = CheckpointRotation(OUT / f"weights of a {kind}", sharded=kind == "folder").attach(trainer)
        trainer.run(batches_of())
        plain, split = other(), fully_shard(other())
        load_weights(plain, checkpoints.last)
        load_weights(split, checkpoints.last)
        found[kind] = same(plain, model), same(split, model)
    return found


@scene
def weights_that_cannot_be_used() -> Any:
    """A file that is missing on one process alone, a folder that can't be written, and another model."""
    path = OUT / "weights.pt"
    save_weights(wrapped(bare()), path)
    shared(None)
    (OUT / "a file").write_text("")
    return {
        "missing": error_of(lambda: load_weights(sharded(), path if rank() == 0 else OUT / "missing.pt")),
        "no folder": error_of(lambda: save_weights(sharded(), OUT / "a file" / "weights.pt")),
        "another": error_of(lambda: load_weights(fully_shard(nn.Linear(2, 2)), path)),
    }


@scene
def one_file_under_ddp() -> Any:
    """Each process names another file; the first one's alone is there."""
    save_weights(wrapped(bare()), OUT / f"by-{rank()}.pt")
    shared(None)
    return sorted(path.name for path in OUT.glob("by-*.pt"))


# -- sharded checkpoints --------------------------------------------------------------------------------------------------


@scene
def sums_that_fail_on_one() -> Any:
    """A disk that can't read again what has been written."""
    folder, true = OUT / "sums", camshaft.checkpoints.sharded_save.checksum

    def checksum(path: Any) -> int:
        if rank() == world() - 1:
            raise OSError(5, "Input/output error", str(path))
        return true(path)

    trainer = trainer_of(sharded())
    CheckpointRotation(folder, sharded=True).attach(trainer)
    camshaft.checkpoints.sharded_save.checksum = checksum
    try:
        error = error_of(lambda: trainer.run(batches_of(), max_epochs=2))
    finally:
        camshaft.checkpoints.sharded_save.checksum = true
    return {"error": error, "litter": sorted(path.name for path in folder.iterdir() if path.is_dir())}


@scene
def statistics_of_the_first() -> Any:
    """BatchNorm's mean, which each process gathers from its own batches, before and after an evaluation and a save."""
    torch.manual_seed(1)
    model = fully_shard(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double())
    trainer = trainer_of(model)
    checkpoints = CheckpointRotation(OUT / "statistics", sharded=True).attach(trainer)
    trainer.run(batches_of())
    means = {"own": model[0].running_mean.clone()}
    checkpoints.resume(checkpoints.last)
    means["loaded"] = model[0].running_mean.clone()
    with torch.no_grad():
        model[0].running_mean.add_(rank())
    create_evaluator(model).run(batches_of())
    return means | {"evaluated": model[0].running_mean.clone()}


# -- evaluation -----------------------------------------------------------------------------------------------------------


@scene
def evaluated_before_the_first_step() -> Any:
    """How far the weights of a split model are from those of one that wasn't evaluated before it was trained."""
    trained = []
    for is_evaluated in (False, True):
        model = sharded()
        if is_evaluated:
            create_evaluator(model).run(batches_of())
        trainer_of(model).run(batches_of())
        trained.append(weights(model))
    return furthest(*trained)


@scene
def evaluated_over_data_of_unknown_length() -> Any:
    """How many batches each process takes, where one has more of them; twice, by one evaluator."""
    evaluator, batches = create_evaluator(sharded()), list(batches_of())
    counts = [evaluator.run(iter_of(batches[: least + rank()])).iteration for least in (2, 4)]
    return counts, error_of(lambda: evaluator.run(batches[: 2 + rank()]))


# -- averages -------------------------------------------------------------------------------------------------------------


def averaged(wrap: Any, folder: Any, epochs: int, **options: Any) -> tuple[Any, Any, Any]:
    """A trainer that averages and is evaluated by the average, its checkpoints, and the average."""
    model = wrap(nn.Sequential(bare(), nn.BatchNorm1d(3, momentum=None).double()))
    trainer = trainer_of(model)
    ema = ExponentialMovingAverage(0.7).attach(trainer)
    evaluator = create_evaluator(model, {"loss": Loss(nn.functional.cross_entropy)})
    Evaluation(evaluator, batches_of(), ema=ema).attach(trainer)
    checkpoints = CheckpointRotation(folder, **options).attach(trainer)
    if list(folder.glob("step-*")):
        checkpoints.resume("auto")
    trainer.run(batches_of(), max_epochs=epochs)
    return trainer, checkpoints, ema


def averages_of(ema: Any) -> dict[str, torch.Tensor]:
    with ema.swapped_in() as model:
        return weights(model)


@scene
def averages_of_a_split_model() -> Any:
    """Beside those under DDP; and of a run that was stopped and resumed, from shards and from a whole file."""
    found = {}
    trainer, _, ema = averaged(DistributedDataParallel, OUT / "ema-ddp", 2)
    whole, trained, score = averages_of(ema), weights(trainer.primary.module), trainer.state.metrics["val/loss"]
    for kind in ("shards", "file"):
        options = {"sharded": kind == "shards"}
        averaged(fully_shard, OUT / f"ema-{kind}", 1, **options)
        trainer, _, ema = averaged(fully_shard, OUT / f"ema-{kind}", 2, **options)
        found[kind] = {
            "gap": furthest(averages_of(ema), whole),
            "own": furthest(weights(trainer.primary.module), trained),
            "score": abs(trainer.state.metrics["val/loss"] - score),
        }
    ahead = furthest(whole, trained)
    return found | {"ahead": ahead, "module": error_of(lambda: ema.module)}


# -- curves ---------------------------------------------------------------------------------------------------------------


def with_names_of_its_own(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Named losses in another order on each process, and one that the second alone has, from its third batch on."""
    loss = masked(model, batch)
    with_names_of_its_own.calls += 1
    zero = loss.detach() * 0
    if rank() == 0:
        return {"loss": loss, "one": zero + 1, "two": zero + 2}
    extra = {"extra": zero + 5} if with_names_of_its_own.calls > 2 else {}
    return {"loss": loss, "two": zero + 4, **extra, "one": zero + 1}


with_names_of_its_own.calls = 0


@scene
def curves_of_other_names() -> int:
    trainer = trainer_of(wrapped(bare()), compute_loss=with_names_of_its_own)
    TensorBoard(OUT / "curves", every=1).attach(trainer)
    return trainer.run(batches_of()).optimizer_step


# -- what a wrapper can't do ----------------------------------------------------------------------------------------------


@scene
def frozen_under_ddp() -> Any:
    """Without and with the search for unused parameters; the second trains what was frozen from epoch 2 on."""
    plain = trainer_of(wrapped(bare()))
    error = error_of(lambda: FreezeParameters("0.*", until_epoch=2).attach(plain))
    model = DistributedDataParallel(bare(), find_unused_parameters=True)
    trainer = trainer_of(model)
    FreezeParameters("0.*", until_epoch=2).attach(trainer)
    moved = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: moved.append(not same(model.module[0], bare()[0])))
    trainer.run(batches_of(), max_epochs=2)
    return {"error": error, "moved": moved}


class CudaGraphs(EagerExecution):
    """What ``capture=True`` refuses, on a device that has no graphs."""

    check_distributed = CudaGraphExecution.check_distributed  # type: ignore[assignment]


@scene
def graphs_of_several() -> Any:
    """What ``capture=True`` sets up, on a device that has no graphs."""
    trainer = trainer_of(wrapped(bare()))
    trainer.primary.execution = CudaGraphs()
    return error_of(lambda: trainer.run(batches_of()))


def players(wrap_generator: Any, wrap_critic: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    networks = [
        wrap_generator(nn.Linear(2, 6).double()),
        wrap_critic(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()),
    ]
    source = torch.Generator().manual_seed(5 + rank())

    def latent(n: int, device: Any) -> torch.Tensor:
        return torch.randn(n, 2, generator=source, dtype=torch.float64)

    trainer = create_gan_trainer(*networks, *(sgd(n) for n in networks), latent=latent, **options)
    trainer.run([x for x, _ in batches_of()])
    return {f"{i}.{name}": p for i, network in enumerate(networks) for name, p in weights(network).items()}


@scene
def penalised_critics() -> Any:
    """A split critic, which is refused, and a split generator beside a critic under DDP, beside both under DDP."""
    refused = error_of(lambda: players(fully_shard, fully_shard, penalty=R1()))
    first = nn.Linear(3, 1)
    called = error_of(lambda: gradient_penalty(fully_shard(first), torch.ones(4, 3), torch.zeros(4, 3)))
    mixed, plain = (players(wrap, DistributedDataParallel, penalty=R1()) for wrap in (fully_shard, DistributedDataParallel))
    return {"refused": refused, "called": called, "gap": furthest(mixed, plain)}


# -- actions of rank 0 ----------------------------------------------------------------------------------------------------


class LocatedError(ValueError):
    """An error that is made from two arguments."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(f"{text} in line {line}")


@scene
def actions_on_rank_zero() -> Any:
    """The result and the errors of actions, each followed by one that succeeds."""
    ranks: list[int] = []

    def act() -> dict[str, int]:
        ranks.append(rank())
        return {"rank": rank()}

    def failing(error: Exception) -> str:
        def action() -> None:
            raise error

        text = error_of(lambda: on_rank_zero(action))
        return f"{text}, then {on_rank_zero(rank)}"

    class LocalError(FileNotFoundError):
        """An error that cannot be pickled."""

    return {
        "result": on_rank_zero(act),
        "ran on": ranks,
        "checkpoint": failing(CheckpointError("a.pt is damaged")),
        "os": failing(OSError(28, "No space left on device", "a.pt")),
        "local": failing(LocalError("no a.pt")),
        "arguments": failing(LocatedError("a word", 3)),
        "no text": failing(ValueError()),
        "not picklable": error_of(lambda: on_rank_zero(lambda: lambda: None)),
    }


# -- what became of the others --------------------------------------------------------------------------------------------


@scene
def a_time_out_that_nobody_explains() -> Any:
    """The processes wait for each other in vain; then one of them hears what the other one has written down."""
    waited = RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete")
    camshaft.distributed.failures.SECONDS_TO_WAIT = 0.1
    failures = Failures()
    own = failures.attribute(waited, "in epoch 1") if rank() == 0 else None
    shared(None)
    theirs = failures.attribute(waited, "in epoch 1") if rank() == 1 else None
    return {"own": own is waited, "theirs": str(theirs)}


@scene
def an_error_that_only_sounds_like_a_loss() -> str:
    """One process's own error."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others as soon as one has gone
    trainer = trainer_of(wrapped(bare()))

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def fail(engine: Any) -> None:
        if rank() == 1:
            raise RuntimeError("the socket of the data server timed out")

    return error_of(lambda: trainer.run(batches_of()))


if __name__ == "__main__":
    main()
