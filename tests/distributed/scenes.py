"""What each process of a test does: scenes by name, run under torchrun; each leaves what it found as ``<scene>-<rank>.pt``."""

import io
import os
import signal
import sys
import tempfile
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine
from ignite.metrics import Accuracy, Loss
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from camshaft import (
    R1,
    CheckpointRotation,
    EarlyStopping,
    Events,
    LRHistory,
    LRScheduling,
    NonFiniteGuard,
    Progress,
    StopOnSignal,
    TensorBoard,
    TimeLimit,
    create_evaluator,
    create_gan_trainer,
    create_trainer,
)

SAMPLES, FEATURES, CLASSES = 84, 6, 3
SCENES: dict[str, Any] = {}


def scene(function: Any) -> Any:
    SCENES[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# -- the task, which one process does on the same global batches ----------------------------------------------------------


def dataset() -> TensorDataset:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, FEATURES, generator=source, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (SAMPLES,), generator=source))


def loader(samples: int = 12, shuffle: bool = False) -> DataLoader:
    """Batches of ``samples`` over all processes together: the same ones however many there are."""
    if world() == 1:
        return DataLoader(dataset(), samples, shuffle=shuffle)
    sampler = DistributedSampler(dataset(), shuffle=shuffle, seed=1)
    return DataLoader(dataset(), samples // world(), sampler=sampler)


def bare() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def wrapped(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if world() > 1 else model


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trainer_of(model: nn.Module, **settings: Any) -> Any:
    loss_fn = None if "compute_loss" in settings else nn.functional.cross_entropy
    return create_trainer(model, sgd(model), loss_fn, **settings)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    inner = getattr(model, "module", model)
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in inner.named_parameters()}


def trained(**settings: Any) -> dict[str, torch.Tensor]:
    model = wrapped(bare())
    trainer_of(model, **settings).run(loader(), max_epochs=3)
    return weights(model)


# -- the same numbers as one process --------------------------------------------------------------------------------------


@scene
def one_batch_a_step() -> Any:
    return trained()


@scene
def accumulation_with_a_ragged_tail() -> Any:
    return trained(accumulation_steps=4, clip_grad_norm=0.5)


@scene
def accumulation_that_drops() -> Any:
    return trained(accumulation_steps=4, partial_window="drop")


@scene
def weighed_by_samples() -> Any:
    """Batches of other sizes on each process."""
    model = wrapped(bare())
    x, y = dataset().tensors
    ends = [0, 7, 9, 20, 26, 27, 40, 44, 60, 71, 75, 80, 84]  # twelve batches
    pairs = [(x[a:b], y[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    windows = [pairs[0:6], pairs[6:12]] if world() == 1 else [pairs[rank() : 6 : world()], pairs[6 + rank() : 12 : world()]]
    batches = [batch for window in windows for batch in window]
    trainer = trainer_of(model, accumulation_steps=6 // world(), loss_weight="samples")
    trainer.run(batches, max_epochs=3)
    return weights(model)


@scene
def weighed_by_a_function() -> Any:
    """Token counts, as a function of the batch gives them."""
    return trained(accumulation_steps=3, loss_weight=lambda batch: float((batch[1] != 0).sum()), compute_loss=masked)


def masked(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, ignore_index=0)


@scene
def an_epoch_of_unknown_length() -> Any:
    model = wrapped(bare())
    trainer = trainer_of(model, accumulation_steps=3)
    trainer.run(iter_of(list(loader())), max_epochs=3)
    return weights(model) | {"steps": torch.tensor(trainer.state.optimizer_step)}


class iter_of:
    """Data that can be passed over again and doesn't know its length."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@scene
def an_epoch_cut_short() -> Any:
    model = wrapped(bare())
    trainer = trainer_of(model, accumulation_steps=4)
    if rank() == world() - 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), trainer.terminate_epoch)
    trainer.run(loader(), max_epochs=2)
    return weights(model) | {"steps": torch.tensor(trainer.state.optimizer_step)}


@scene
def a_gan() -> Any:
    torch.manual_seed(3)
    generator, critic = (
        nn.Linear(2, FEATURES).double(),
        nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)).double(),
    )
    networks = [wrapped(generator), wrapped(critic)]
    share = slice(None) if world() == 1 else slice(rank(), None, world())
    source = torch.Generator().manual_seed(5)

    def latent(n: int, device: Any) -> torch.Tensor:
        return torch.randn(n * world(), 2, generator=source, dtype=torch.float64)[share]

    trainer = create_gan_trainer(
        *networks, *(sgd(n) for n in networks), latent=latent, penalty=R1(5.0), discriminator_steps=2, accumulation_steps=2
    )
    trainer.run([x[share] for x, _ in DataLoader(dataset(), 12)], max_epochs=2)
    return {f"{i}.{name}": p for i, network in enumerate(networks) for name, p in weights(network).items()}


# -- how often something travels ------------------------------------------------------------------------------------------


@scene
def reductions() -> Any:
    """How many gradient reductions there are for how many optimizer steps."""
    model = wrapped(bare())
    count = [0]

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        count[0] += bucket.is_last()
        return dist.all_reduce(bucket.buffer().div_(world()), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    trainer = trainer_of(model, accumulation_steps=4)
    trainer.run(loader(), max_epochs=3)
    return {"reductions": count[0], "steps": trainer.state.optimizer_step}


# -- decisions ------------------------------------------------------------------------------------------------------------


@scene
def stopped_by_one() -> Any:
    model = wrapped(bare())
    trainer = trainer_of(model)
    if rank() == world() - 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda e: e.terminate(reason="enough"))
    state = trainer.run(loader(), max_epochs=3)
    return {"iteration": state.iteration, "reason": state.stop_reason, **weights(model)}


@scene
def skipped_by_one() -> Any:
    """A loss that isn't finite on one process, whose gradient is."""
    model = wrapped(bare())
    trainer = trainer_of(model)
    NonFiniteGuard("skip").attach(trainer)

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def spoil(engine: Any) -> None:
        if rank() == world() - 1:
            engine.state.batch[0].fill_(float("nan"))

    state = trainer.run(loader(), max_epochs=1)
    return {"steps": state.optimizer_step, "skipped": state.skipped_steps, **weights(model)}


@scene
def metrics_of_all() -> Any:
    model = wrapped(bare())
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy(), "loss": Loss(nn.functional.cross_entropy)})
    x, y = dataset().tensors
    pairs = [(x[a : a + 7], y[a : a + 7]) for a in range(0, SAMPLES, 7)]  # twelve, and one process has more of them
    mine = pairs if world() == 1 else (pairs[:7] if rank() == 0 else pairs[7 + rank() - 1 :: world() - 1])
    return dict(evaluator.run(mine).metrics)


# -- FSDP2 ----------------------------------------------------------------------------------------------------------------


def sharded() -> nn.Module:
    model = bare()
    if world() > 1:
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer)
        fully_shard(model)
    return model


@scene
def sharded_accumulation() -> Any:
    model = sharded()
    trainer_of(model, accumulation_steps=4, clip_grad_norm=0.5).run(loader(), max_epochs=3)
    return weights(model)


@scene
def sharded_weighed_by_samples() -> Any:
    model = sharded()
    trainer = trainer_of(model, accumulation_steps=4, loss_weight="samples")
    NonFiniteGuard().attach(trainer)
    trainer.run(iter_of(list(loader())), max_epochs=3)
    return weights(model)


@scene
def sharded_with_a_limit_of_iterations() -> Any:
    """The data ends inside a window before the limit is reached."""
    model = sharded()
    trainer = trainer_of(model, accumulation_steps=4)
    trainer.run(iter_of(list(loader())), max_iters=10)
    return weights(model) | {"steps": torch.tensor(trainer.state.optimizer_step)}


@scene
def parameters_beside_the_shards() -> Any:
    """Part of the model is sharded, the rest and the loss have parameters of which FSDP2 doesn't know."""
    model = bare()
    if world() > 1:
        fully_shard(model[0])
    return {f"model.{name}": value for name, value in with_a_loss_of_its_own(model).items()}


@scene
def parameters_beside_the_wrapper() -> Any:
    return with_a_loss_of_its_own(wrapped(bare()))


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(y_pred * self.temperature, y)


def with_a_loss_of_its_own(model: nn.Module) -> dict[str, torch.Tensor]:
    loss_fn = Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1)
    create_trainer(model, optimizer, loss_fn, accumulation_steps=4).run(loader(), max_epochs=2)
    return weights(model) | {"temperature": loss_fn.temperature.detach()}


# -- what comes after -----------------------------------------------------------------------------------------------------


def left_by_an_exception(wrap: Any) -> float:
    """How far a second run goes astray after a first one that has failed inside a window on every process."""
    ends = []
    for fails in (False, True):
        trainer = trainer_of(wrap(bare()), accumulation_steps=4)
        if fails:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=3), raise_here)
            error_of(lambda trainer=trainer: trainer.run(loader()))
            trainer.remove_event_handler(raise_here, Events.ITERATION_STARTED)
            trainer.state.iteration = trainer.state.epoch = 0
        trainer.run(loader(), max_epochs=2)
        ends.append(weights(trainer.primary.module))
    return furthest(*ends)


def raise_here() -> None:
    raise ValueError("everywhere")


@scene
def run_again_after_an_exception() -> Any:
    return {"ddp": left_by_an_exception(wrapped), "fsdp": left_by_an_exception(lambda model: fully_sharded(model))}


@scene
def a_loop_of_ones_own_after_a_run() -> Any:
    """Stopped inside a window; then a plain backward pass, which must be reduced."""
    model = wrapped(bare())
    trainer = trainer_of(model, accumulation_steps=4)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate)
    trainer.run(loader())
    model.zero_grad()
    model(torch.full((4, FEATURES), 1.0 + rank()).double()).square().mean().backward()
    return [p.grad for p in model.parameters()]


@scene
def interrupted_by_one() -> Any:
    trainer = trainer_of(wrapped(bare()))
    if rank() == world() - 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), trainer.interrupt)
    with trainer_can_be_interrupted():
        trainer.run(loader(), max_epochs=2)
        held_up = trainer.state.iteration
        trainer.run(loader(), max_epochs=2)
    return {"held up": held_up, "iteration": trainer.state.iteration}


@contextmanager
def trainer_can_be_interrupted() -> Any:
    before, Engine.interrupt_resume_enabled = Engine.interrupt_resume_enabled, True
    try:
        yield
    finally:
        Engine.interrupt_resume_enabled = before


@scene
def asked_to_stop_at_the_start() -> Any:
    trainer = trainer_of(wrapped(bare()))
    if rank() == world() - 1:
        trainer.add_event_handler(Events.STARTED, lambda e: e.terminate(reason="not today"))
    state = trainer.run(loader())
    return {"iteration": state.iteration, "epoch": state.epoch}


@scene
def failing_twice() -> Any:
    """The second failure is told of, and not the first one again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer, errors = trainer_of(wrapped(bare())), []
    for text, where in (("first", (0, 1)), ("second", (1,))):
        failing = partial(fail_on, where, text)
        trainer.add_event_handler(Events.ITERATION_STARTED, failing)
        errors.append(error_of(lambda: trainer.run(loader())))
        trainer.remove_event_handler(failing, Events.ITERATION_STARTED)
        trainer.state.iteration = trainer.state.epoch = 0
    return errors


def fail_on(where: Any, text: str) -> None:
    if rank() in where:
        raise ValueError(text)


# -- checkpoints ----------------------------------------------------------------------------------------------------------


@scene
def saved_inside_a_run() -> Any:
    """Which checkpoints there are when an epoch begins, by when they are asked for."""
    return {
        name: saves_by_epoch(OUT / f"saved-{name}", every)
        for name, every in (("epochs", Events.EPOCH_COMPLETED), ("iterations", Events.ITERATION_COMPLETED(every=5)))
    }


def saves_by_epoch(folder: Path, every: Any) -> list[list[int]]:
    trainer = trainer_of(wrapped(bare()))
    checkpoints = CheckpointRotation(folder, keep_last=9, every=every).attach(trainer)
    saves = lambda: [entry.iteration for entry in checkpoints.index.entries]  # noqa: E731
    seen: list[list[int]] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append(saves()))
    trainer.run(loader(), max_epochs=3)
    return [*seen, saves()]


@scene
def saved_behind() -> Any:
    trainer = trainer_of(wrapped(bare()))
    checkpoints = CheckpointRotation(OUT / "behind", background=True).attach(trainer)
    trainer.run(loader())
    return str(checkpoints.last)


@scene
def saved_on_an_exception() -> Any:
    trainer = trainer_of(wrapped(bare()))
    checkpoints = CheckpointRotation(OUT / "refused").attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), raise_here)
    told = []
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: told.append(error_of(checkpoints.save)))
    error_of(lambda: trainer.run(loader()))
    return told[0]


@scene
def a_checkpoint_inside_a_window_of_shards() -> Any:
    trainer, told = trainer_of(fully_sharded(bare()), accumulation_steps=4), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: told.append(error_of(trainer.checkpoint)))
    trainer.run(loader())
    return told[0]


class EachItsOwn(nn.Module):
    """Which half is used depends on the pass and on the process."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList(nn.Linear(FEATURES, CLASSES).double() for _ in range(2))
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.halves[(self.passes + rank()) % 2](x)


def stopped_and_resumed(stop: int, make: Any, data: Any, after: Any = lambda model: None, **options: Any) -> float:
    """How far the weights end from those of a run that wasn't stopped."""
    folder = Path(shared(tempfile.mkdtemp(dir=OUT) if rank() == 0 else None))
    ends = []
    for part in ("whole", "stopped", "resumed"):
        torch.manual_seed(1)
        model = make()
        trainer = trainer_of(model, accumulation_steps=3)
        checkpoints = CheckpointRotation(folder / part.replace("resumed", "stopped"), **options).attach(trainer)
        if part == "stopped":
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), trainer.terminate)
        if part == "resumed":
            checkpoints.resume("auto")
            after(model)
        trainer.run(data(), max_epochs=3)
        ends.append(weights(model))
    return furthest(ends[0], ends[2])


@scene
def resumed_where_gradients_differ() -> Any:
    def after(model: Any) -> None:
        model.module.passes = 2

    make = lambda: DistributedDataParallel(EachItsOwn(), find_unused_parameters=True)  # noqa: E731
    return stopped_and_resumed(2, make, lambda: list(loader()), after)


@scene
def resumed_inside_a_window_of_shards() -> Any:
    """Of data of unknown length, so that the gradients have travelled already."""
    data = lambda: iter_of(list(loader()))  # noqa: E731
    return {kind: stopped_and_resumed(2, lambda: fully_sharded(bare()), data, sharded=kind) for kind in (False, True)}


@scene
def resumed_at_the_end_of_an_epoch_that_another_ends() -> Any:
    data = lambda: iter_of(list(loader())[: 5 + 2 * min(rank(), 1)])  # noqa: E731
    return {stop: stopped_and_resumed(stop, lambda: wrapped(bare()), data) for stop in (5, 10)}


def noisy(wrap: Any) -> nn.Module:
    """A network whose passes draw random numbers, other ones on each process."""
    torch.manual_seed(1)
    return wrap(nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES)).double())


def run_of(folder: Path, wrap: Any, **options: Any) -> tuple[Any, Any]:
    model = noisy(wrap)
    trainer = create_trainer(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), nn.functional.cross_entropy, accumulation_steps=3
    )
    checkpoints = CheckpointRotation(folder, keep_last=1, **options).attach(trainer)
    torch.manual_seed(7 + rank())
    return trainer, checkpoints


def resumed(out: Path, stop: int, wrap: Any = wrapped, **options: Any) -> float:
    """How far the weights of a run that was stopped and resumed are from those of one that wasn't."""
    folder = Path(tempfile.mkdtemp(dir=out)) if rank() == 0 else None
    folder = shared(folder)
    whole, _ = run_of(folder / "whole", wrap, **options)
    whole.run(loader(shuffle=True), max_epochs=2)
    stopped, _ = run_of(folder / "stopped", wrap, **options)
    if rank() == 0:
        stopped.add_event_handler(Events.ITERATION_COMPLETED(once=stop), stopped.terminate)
    stopped.run(loader(shuffle=True), max_epochs=2)
    again, checkpoints = run_of(folder / "stopped", wrap, **options)
    torch.manual_seed(99)
    assert checkpoints.resume("auto") is not None
    again.run(loader(shuffle=True), max_epochs=2)
    assert again.state.iteration == whole.state.iteration == 14
    return furthest(weights(whole.primary.module), weights(again.primary.module))


def furthest(one: Any, other: Any) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def shared(value: Any) -> Any:
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


@scene
def resumed_after_each_iteration() -> Any:
    return {stop: resumed(OUT, stop) for stop in range(1, 14)}


@scene
def resumed_from_shards() -> Any:
    return {stop: resumed(OUT, stop, fully_sharded, sharded=True) for stop in (3, 6, 8, 10)}


@scene
def resumed_from_a_whole_file_of_shards() -> Any:
    return {stop: resumed(OUT, stop, fully_sharded) for stop in (3, 6, 8, 10)}


def fully_sharded(model: nn.Module) -> nn.Module:
    if world() > 1:
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer)
        fully_shard(model)
    return model


@scene
def leave_shards() -> Any:
    """Half a run, for another number of processes to go on with."""
    trainer, _ = run_of(OUT / "handed_on", fully_sharded, sharded=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), trainer.terminate)
    trainer.run(loader(shuffle=True), max_epochs=2)
    return {"step": trainer.state.optimizer_step, **weights(trainer.primary.module)}


@scene
def take_shards() -> Any:
    trainer, checkpoints = run_of(OUT / "handed_on", fully_sharded, sharded=True)
    before = weights(trainer.primary.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoints.resume("auto")
    taken = weights(trainer.primary.module)
    moments = trainer.primary.optimizers[0].state_dict()["state"][0]["exp_avg"]
    left = trainer.state.epoch_length
    state = trainer.run(loader(shuffle=True), max_epochs=2)
    return {
        "moved": furthest(before, taken),
        "moments": float(getattr(moments, "full_tensor", lambda: moments)().abs().sum()),
        "epoch": state.epoch,
        "iteration": state.iteration,
        "steps": state.optimizer_step,
        "left": left,
        **taken,
    }


# -- mistakes, and ends that one process brings about ---------------------------------------------------------------------


def error_of(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@scene
def a_model_that_is_not_wrapped() -> str:
    return error_of(lambda: trainer_of(bare()).run(loader()))


@scene
def batches_of_other_number() -> str:
    return error_of(lambda: trainer_of(wrapped(bare())).run(list(loader())[: 5 + rank()]))


@scene
def a_handler_on_one_alone() -> str:
    trainer = trainer_of(wrapped(bare()))
    if rank() == 0:
        LRHistory().attach(trainer)
    return error_of(lambda: trainer.run(loader()))


@scene
def a_wrapper_that_is_passed_by() -> str:
    """Its gradients never travel."""
    model = wrapped(bare())
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda m, batch: masked(m.module, batch))
    return error_of(lambda: trainer.run(loader()))


@scene
def a_schedule_of_one_alone() -> str:
    trainer = trainer_of(wrapped(bare()))
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.primary.optimizers[0], patience=0)
    LRScheduling(schedule, metric="score").attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=float(-e.state.epoch * rank())))
    return error_of(lambda: trainer.run(loader(), max_epochs=4))


@scene
def unfrozen_after_wrapping() -> str:
    """DDP knows nothing of the parameters that were frozen when it was made."""
    model = bare()
    model[0].requires_grad_(False)
    trainer = trainer_of(wrapped(model))
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: model[0].requires_grad_(True))
    return error_of(lambda: trainer.run(loader(), max_epochs=3))


@scene
def a_guard_that_raises() -> str:
    trainer = trainer_of(wrapped(bare()))
    NonFiniteGuard("raise").attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda e: rank() or e.state.batch[0].fill_(float("nan")))
    return error_of(lambda: trainer.run(loader())) + f" after {trainer.state.optimizer_step}"


@scene
def a_score_of_one_alone() -> dict[str, Any]:
    """Early stopping by a metric that is another one on each process."""
    trainer = trainer_of(wrapped(bare()))
    EarlyStopping("score", patience=2).attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=float(e.state.epoch * (-1 if rank() == 0 else 1)))
    )
    state = trainer.run(loader(), max_epochs=6)
    return {"epoch": state.epoch, "reason": state.stop_reason}


@scene
def a_limit_of_one_alone() -> dict[str, Any]:
    trainer = trainer_of(wrapped(bare()), accumulation_steps=2)
    limit = TimeLimit(1).attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def hurry(engine: Any) -> None:
        limit.hours = 1e-9 if rank() == world() - 1 else 1

    state = trainer.run(loader(), max_epochs=3)
    return {"iteration": state.iteration, "steps": state.optimizer_step}


@scene
def who_writes() -> dict[str, Any]:
    folder = OUT / "written"
    model = wrapped(bare())
    trainer = trainer_of(model)
    TensorBoard(folder / "curves", every=2).attach(trainer)
    Progress(file=(stream := io.StringIO()), every_seconds=0).attach(trainer)
    checkpoints = CheckpointRotation(folder / "checkpoints", keep_last=2).attach(trainer)
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.loss)))
    trainer.run(loader(), max_epochs=2)
    return {"losses": losses, "bar": len(stream.getvalue()), "last": str(checkpoints.last), "pid": os.getpid()}


@scene
def raised_by_one() -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others as soon as one has gone
    trainer = trainer_of(wrapped(bare()))

    @trainer.on(Events.ITERATION_STARTED(once=4))
    def fail(engine: Any) -> None:
        if rank() == 1:
            raise ValueError("this batch is spoiled")

    return {"error": error_of(lambda: trainer.run(loader(), max_epochs=3)), "iteration": trainer.state.iteration}


@scene
def killed_by_one() -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = trainer_of(wrapped(bare()))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=4), lambda: rank() == 1 and os.kill(os.getpid(), signal.SIGKILL))
    return {"error": error_of(lambda: trainer.run(loader(), max_epochs=3))}


@scene
def signalled_to_one() -> dict[str, Any]:
    trainer, checkpoints = run_of(OUT / "signalled", wrapped)
    StopOnSignal().attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=4), lambda: rank() == 1 and os.kill(os.getpid(), signal.SIGTERM))
    code = None
    try:
        trainer.run(loader(), max_epochs=3)
    except SystemExit as end:
        code = end.code
    state = trainer.state
    return {"code": code, "iteration": state.iteration, "steps": state.optimizer_step, "reason": state.stop_reason}


OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def main() -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        idist.initialize("gloo")
    for name in sys.argv[2:]:
        torch.manual_seed(rank())
        torch.save(SCENES[name](), OUT / f"{name}-{rank()}.pt")
    if "RANK" in os.environ:
        idist.finalize()


if __name__ == "__main__":
    main()
