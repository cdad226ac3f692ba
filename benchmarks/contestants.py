"""The loops that are compared: each trains the same task, and differs only in who drives it."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["CONTESTANTS", "GAMES", "HELD_BACK", "NEEDS", "SIZES", "Batches", "Task", "make_game", "make_task"]

WINDOW = 4
"""The batches of a window where gradients are accumulated."""
LOG_EVERY = 10
"""The optimizer steps between two points of a curve."""
SIZES = {"tiny": (16, 32, 4, 32), "large": (256, 512, 10, 128), "wide": (1024, 4096, 1000, 512)}
SIZES |= {f"{size}, fused": numbers for size, numbers in SIZES.items()}
SIZES["images"] = (64, 64, 100, 128)
"""Inputs, hidden units, classes and samples per batch of each model; a step of the large one takes over 2 ms on a CPU, the wide
one is for a GPU. The optimizer of a fused one is. The one for images has three convolutions, and inputs of so many rows."""
LATENT = 8
"""The size of a generator's latents."""


class Batches(list[Any]):
    """The data of a round. It takes the time from its first batch to its last, so that no start-up is counted."""

    def __init__(self, batches: list[Any], clock: Callable[[], float]) -> None:
        super().__init__(batches)
        self.clock = clock
        self.began = self.ended = 0.0

    def __iter__(self) -> Iterator[Any]:
        self.began = self.clock()
        yield from self[:-1]
        self.ended = self.clock()
        yield self[-1]

    @property
    def per_iteration(self) -> float:
        """The microseconds of an iteration in the last pass."""
        return (self.ended - self.began) / (len(self) - 1) * 1e6


@dataclass
class Task:
    """What a contestant is given: the same initial weights and the same batches for each."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    batches: Batches
    folder: Path
    loss_fn: Callable[[Any, Any], torch.Tensor] = nn.functional.cross_entropy
    device: torch.device = torch.device("cpu")


def make_task(
    size: str, batches: int, folder: Path, clock: Callable[[], float] = time.perf_counter, device: str = "cpu"
) -> Task:
    """The task of a size, with the same numbers at every call; for a GPU its batches are in pinned memory."""
    inputs, hidden, classes, samples = SIZES[size]
    torch.manual_seed(0)
    if size == "images":
        shape, widths = (3, inputs, inputs), ((3, hidden), (hidden, 2 * hidden), (2 * hidden, 4 * hidden))
        layers = [nn.Sequential(nn.Conv2d(*width, 3, 2, 1), nn.BatchNorm2d(width[1]), nn.ReLU()) for width in widths]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * hidden, classes))
    else:
        shape = (inputs,)
        model = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=size.endswith("fused") or None)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9999)
    data = [(torch.randn(samples, *shape), torch.randint(classes, (samples,))) for _ in range(batches)]
    if device != "cpu":
        data = [(x.pin_memory(), y.pin_memory()) for x, y in data]
    return Task(model, optimizer, scheduler, Batches(data, clock), folder, device=torch.device(device))


def make_game(batches: int, folder: Path, clock: Callable[[], float] = time.perf_counter) -> Task:
    """The task of a GAN: the model holds both networks, and the batches have no classes."""
    inputs, hidden, _, samples = SIZES["tiny"]
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(LATENT, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, inputs)
    )
    critic = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    task = make_task("tiny", 1, folder, clock)
    data = [torch.randn(samples, inputs) for _ in range(batches)]
    task.model, task.batches = nn.ModuleDict({"generator": generator, "critic": critic}), Batches(data, clock)
    return task


Round = Callable[[], Any]
CONTESTANTS: dict[str, Callable[[Task], Round]] = {}
"""By name: takes a task and gives the function that trains one pass over its batches."""
NEEDS: dict[str, str] = {}
"""The module that a contestant can't do without."""
HELD_BACK = {
    "composer": "mosaicml 0.32.1 needs torch<2.7.1",
    "fastai": "it brings torchvision, and with another build than torch's (CPU or CUDA) Lightning and Poutyne fail beside it",
}
"""Why a module isn't installed beside the others."""


def contestant(name: str, needs: str = "torch") -> Callable[[Callable[[Task], Round]], Callable[[Task], Round]]:
    """Enters a loop under a name."""

    def enter(prepare: Callable[[Task], Round]) -> Callable[[Task], Round]:
        CONTESTANTS[name], NEEDS[name] = prepare, needs
        return prepare

    return enter


# -- by hand --------------------------------------------------------------------------------------------------------------


@contestant("bare loop")
def bare(task: Task) -> Round:
    """What a careful person writes: nothing waits for the device, and the graph is let go."""
    model, optimizer, loss_fn, device = task.model, task.optimizer, task.loss_fn, task.device

    def run() -> None:
        model.train()
        for x, y in task.batches:
            optimizer.zero_grad()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            loss = loss.detach()

    return run


@contestant("blog template")
def template(task: Task) -> Round:
    """What the tutorials print: training mode and ``.item()`` in every iteration."""
    model, optimizer, loss_fn, device = task.model, task.optimizer, task.loss_fn, task.device

    def run() -> float:
        running = 0.0
        for x, y in task.batches:
            model.train()
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            output = model(x)
            loss = loss_fn(output, y)
            loss.backward()
            optimizer.step()
            running += loss.item()
        return running

    return run


@contestant("bare loop, accumulating")
def bare_accumulating(task: Task) -> Round:
    """Windows of four batches."""
    model, optimizer, loss_fn, device = task.model, task.optimizer, task.loss_fn, task.device

    def run() -> None:
        model.train()
        for number, (x, y) in enumerate(task.batches):
            if number % WINDOW == 0:
                optimizer.zero_grad()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = loss_fn(model(x), y)
            (loss / WINDOW).backward()
            if number % WINDOW == WINDOW - 1:
                optimizer.step()
            loss = loss.detach()

    return run


@contestant("bare loop, clip + schedule + history")
def bare_clipping(task: Task) -> Round:
    """The norm bounded, a schedule per step, and every rate noted."""
    model, optimizer, loss_fn, device = task.model, task.optimizer, task.loss_fn, task.device
    parameters, history = list(model.parameters()), []

    def run() -> None:
        model.train()
        for x, y in task.batches:
            optimizer.zero_grad()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = loss_fn(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            history.append(optimizer.param_groups[0]["lr"])
            task.scheduler.step()
            loss = loss.detach()

    return run


@contestant("bare loop, TensorBoard + bar", needs="tqdm")
def bare_logging(task: Task) -> Round:
    """The mean loss and the rate every ten steps, and a tqdm bar that shows the last of them."""
    from torch.utils.tensorboard import SummaryWriter
    from tqdm.auto import tqdm

    model, optimizer, loss_fn, device = task.model, task.optimizer, task.loss_fn, task.device

    def run() -> None:
        model.train()
        total, step = torch.zeros((), device=device), 0
        with SummaryWriter(os.fspath(task.folder)) as writer, tqdm(total=len(task.batches)) as bar:
            for x, y in task.batches:
                optimizer.zero_grad()
                x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                loss = loss_fn(model(x), y)
                loss.backward()
                optimizer.step()
                total += loss.detach()
                step += 1
                if step % LOG_EVERY == 0:
                    mean = total.item() / LOG_EVERY
                    writer.add_scalar("train/loss", mean, step)
                    writer.add_scalar("train/lr", optimizer.param_groups[0]["lr"], step)
                    bar.set_postfix(loss=mean, refresh=False)
                    total.zero_()
                bar.update()

    return run


@contestant("bare loop, everything", needs="tqdm")
def bare_everything(task: Task) -> Round:
    """All of the above, a check of loss and gradient before the step, and an average of the weights."""
    from torch.utils.tensorboard import SummaryWriter
    from tqdm.auto import tqdm

    model, optimizer, loss_fn, device = task.model, task.optimizer, task.loss_fn, task.device
    parameters, history = list(model.parameters()), []
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    def run() -> None:
        model.train()
        total, step = torch.zeros((), device=device), 0
        with SummaryWriter(os.fspath(task.folder)) as writer, tqdm(total=len(task.batches)) as bar:
            for x, y in task.batches:
                optimizer.zero_grad()
                x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                loss = loss_fn(model(x), y)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, 1.0)
                if not bool(torch.isfinite(norm + loss.detach())):
                    raise FloatingPointError("not finite")
                optimizer.step()
                history.append(optimizer.param_groups[0]["lr"])
                average.update_parameters(model)
                total += loss.detach()
                step += 1
                if step % LOG_EVERY == 0:
                    mean = total.item() / LOG_EVERY
                    writer.add_scalar("train/loss", mean, step)
                    writer.add_scalar("train/lr", history[-1], step)
                    writer.add_scalar("train/grad_norm", norm.item(), step)
                    bar.set_postfix(loss=mean, refresh=False)
                    total.zero_()
                task.scheduler.step()
                bar.update()

    return run


def adversaries(task: Task) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    """Both networks and an optimizer for each."""
    generator, critic = task.model["generator"], task.model["critic"]
    return generator, critic, *(torch.optim.SGD(network.parameters(), lr=1e-5, momentum=0.9) for network in (generator, critic))


def bare_game(steps: int, penalised: bool) -> Callable[[Task], Round]:
    """A Wasserstein GAN as a careful person writes it: no gradient is made for the network that isn't trained."""

    def prepare(task: Task) -> Round:
        generator, critic, g_optimizer, c_optimizer = adversaries(task)
        device, judges = task.device, list(critic.parameters())

        def run() -> None:
            torch.manual_seed(1)
            generator.train()
            critic.train()
            for step, real in enumerate(task.batches, start=1):
                c_optimizer.zero_grad()
                real = real.to(device, non_blocking=True)
                with torch.no_grad():
                    fake = generator(torch.randn(len(real), LATENT, device=device))
                c_loss = loss = critic(fake).mean() - critic(real).mean()
                if penalised:
                    alpha = torch.rand(len(real), 1, device=device)
                    points = (alpha * real + (1 - alpha) * fake).requires_grad_()
                    (slope,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
                    penalty = 10.0 * ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
                    loss = c_loss + penalty
                    penalty = penalty.detach()
                loss.backward()
                c_optimizer.step()
                c_loss = c_loss.detach()
                if step % steps == 0:
                    for parameter in judges:
                        parameter.requires_grad_(False)
                    g_optimizer.zero_grad()
                    g_loss = -critic(generator(torch.randn(len(real), LATENT, device=device))).mean()
                    g_loss.backward()
                    g_optimizer.step()
                    for parameter in judges:
                        parameter.requires_grad_(True)
                    g_loss = g_loss.detach()

        return run

    return prepare


@contestant("bare loop, captured", needs="triton")
def bare_captured(task: Task) -> Round:
    """Forward, backward and step as one CUDA graph, for batches of one shape: as quick as it gets by hand."""
    model, optimizer, loss_fn, device = task.model, task.optimizer, task.loss_fn, task.device
    x, y = (part.to(device) for part in task.batches[0])
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():  # as before the first of those steps
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
            optimizer.state[parameter]["momentum_buffer"].zero_()

    def run() -> None:
        for next_x, next_y in task.batches:
            x.copy_(next_x, non_blocking=True)
            y.copy_(next_y, non_blocking=True)
            graph.replay()

    return run


# -- camshaft -------------------------------------------------------------------------------------------------------------


def camshaft_trainer(task: Task, **options: Any) -> Any:
    from camshaft import create_trainer

    return create_trainer(task.model, task.optimizer, task.loss_fn, **options)


@contestant("camshaft")
def camshaft(task: Task) -> Round:
    """Every event available, nothing attached."""
    trainer = camshaft_trainer(task)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, prefetched")
def camshaft_prefetched(task: Task) -> Round:
    """The next batch on its way while the present one is worked on."""
    from camshaft import Prefetch

    trainer, data = camshaft_trainer(task), Prefetch(task.batches, task.device)
    return lambda: trainer.run(data, max_epochs=1)


@contestant("camshaft, compiled", needs="triton")
def camshaft_compiled(task: Task) -> Round:
    """The model's own passes as CUDA graphs, by the compiler."""
    from camshaft import create_trainer

    model = torch.compile(task.model, mode="reduce-overhead")
    trainer = create_trainer(model, task.optimizer, task.loss_fn)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, channels last")
def camshaft_channels_last(task: Task) -> Round:
    """Weights and images in the layout that convolutions are made for."""
    task.model.to(memory_format=torch.channels_last)
    task.batches[:] = [(x.to(memory_format=torch.channels_last), y) for x, y in task.batches]
    if task.device.type == "cuda":
        task.batches[:] = [(x.pin_memory(), y) for x, y in task.batches]
    trainer = camshaft_trainer(task)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, TF32")
def camshaft_tf32(task: Task) -> Round:
    """Float32 products on tensor cores, for this contestant's rounds alone."""
    trainer = camshaft_trainer(task)

    def run() -> None:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        trainer.run(task.batches, max_epochs=1)
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

    return run


@contestant("camshaft, bf16")
def camshaft_bf16(task: Task) -> Round:
    """Mixed precision."""
    trainer = camshaft_trainer(task, amp="bf16")
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, captured")
def camshaft_captured(task: Task) -> Round:
    """Passes and step as CUDA graphs, with every event but two at its moment."""
    trainer = camshaft_trainer(task, capture=True)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, accumulating")
def camshaft_accumulating(task: Task) -> Round:
    trainer = camshaft_trainer(task, accumulation_steps=WINDOW)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, clip + schedule + history")
def camshaft_clipping(task: Task) -> Round:
    from camshaft import LRHistory

    trainer = camshaft_trainer(task, clip_grad_norm=1.0, scheduler=task.scheduler)
    LRHistory().attach(trainer)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, TensorBoard + bar", needs="tqdm")
def camshaft_logging(task: Task) -> Round:
    from camshaft import Progress, TensorBoard

    trainer = camshaft_trainer(task)
    TensorBoard(task.folder, every=LOG_EVERY).attach(trainer)
    Progress().attach(trainer)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, everything", needs="tqdm")
def camshaft_everything(task: Task, **options: Any) -> Round:
    """Every handler that is shipped and fits one process in full precision."""
    from ignite.metrics import Loss

    from camshaft import (
        CheckpointRotation,
        EarlyStopping,
        Evaluation,
        ExponentialMovingAverage,
        LRHistory,
        NonFiniteGuard,
        Progress,
        StopOnSignal,
        TensorBoard,
        create_evaluator,
    )

    trainer = camshaft_trainer(task, clip_grad_norm=1.0, scheduler=task.scheduler, **options)
    evaluator = create_evaluator(task.model, metrics={"loss": Loss(task.loss_fn)})
    LRHistory().attach(trainer)
    ExponentialMovingAverage(0.999).attach(trainer)
    NonFiniteGuard().attach(trainer)
    Evaluation(evaluator, task.batches[:2]).attach(trainer)
    EarlyStopping("val/loss", mode="min", patience=1_000_000).attach(trainer)
    TensorBoard(task.folder / "curves", every=LOG_EVERY).attach(trainer)
    Progress().attach(trainer)
    CheckpointRotation(task.folder / "checkpoints", keep_last=1).attach(trainer)
    StopOnSignal().attach(trainer)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("camshaft, everything, captured", needs="tqdm")
def camshaft_everything_captured(task: Task) -> Round:
    """The same with passes, clipping and step as CUDA graphs."""
    return camshaft_everything(task, capture=True)


def camshaft_game(steps: int, penalised: bool) -> Callable[[Task], Round]:
    """The same by the GAN engine."""

    def prepare(task: Task) -> Round:
        from camshaft import GradientPenalty, create_gan_trainer

        penalty = GradientPenalty() if penalised else None
        trainer = create_gan_trainer(*adversaries(task), latent=LATENT, penalty=penalty, discriminator_steps=steps)

        def run() -> None:
            torch.manual_seed(1)
            trainer.run(task.batches, max_epochs=1)

        return run

    return prepare


GAMES = {"WGAN": (1, False), "WGAN, 5 to 1": (5, False), "WGAN-GP, 5 to 1": (5, True)}
for game, settings in GAMES.items():
    contestant(f"bare loop, {game}")(bare_game(*settings))
    contestant(f"camshaft, {game}")(camshaft_game(*settings))


# -- Ignite ---------------------------------------------------------------------------------------------------------------


def ignite_trainer(task: Task, **options: Any) -> Any:
    from ignite.engine import create_supervised_trainer

    return create_supervised_trainer(task.model, task.optimizer, task.loss_fn, device=task.device, non_blocking=True, **options)


@contestant("Ignite", needs="ignite")
def ignite(task: Task) -> Round:
    trainer = ignite_trainer(task)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("Ignite, accumulating", needs="ignite")
def ignite_accumulating(task: Task) -> Round:
    trainer = ignite_trainer(task, gradient_accumulation_steps=WINDOW)
    return lambda: trainer.run(task.batches, max_epochs=1)


@contestant("Ignite, TensorBoard + bar", needs="tqdm")
def ignite_logging(task: Task) -> Round:
    from ignite.engine import Events
    from ignite.handlers import ProgressBar
    from ignite.handlers.tensorboard_logger import OptimizerParamsHandler, TensorboardLogger

    trainer = ignite_trainer(task)
    every = Events.ITERATION_COMPLETED(every=LOG_EVERY)
    logger = TensorboardLogger(log_dir=os.fspath(task.folder))
    logger.attach_output_handler(trainer, every, tag="train", output_transform=lambda loss: {"loss": loss})
    logger.attach(trainer, OptimizerParamsHandler(task.optimizer), every)
    ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
    return lambda: trainer.run(task.batches, max_epochs=1)


# -- handlers by number ---------------------------------------------------------------------------------------------------


def nothing(engine: Any) -> None:
    """A handler with no work of its own."""


def with_handlers(number: int, library: str, sleeping: bool) -> Callable[[Task], Round]:
    """A trainer with so many handlers at one event, which run at each iteration or never."""

    def prepare(task: Task) -> Round:
        from ignite.engine import Events

        from camshaft import StepEvents

        trainer = camshaft_trainer(task) if library == "camshaft" else ignite_trainer(task)
        event = StepEvents.GRADIENTS_READY if library == "camshaft" else Events.ITERATION_COMPLETED
        for _ in range(number):
            trainer.add_event_handler(event(every=1_000_000) if sleeping else event, nothing)
        return lambda: trainer.run(task.batches, max_epochs=1)

    return prepare


COUNTS = (1, 4, 16, 64)
for library in ("camshaft", "Ignite"):
    for count in COUNTS:
        contestant(f"{library}, {count} running", needs="ignite")(with_handlers(count, library, sleeping=False))
        contestant(f"{library}, {count} sleeping", needs="ignite")(with_handlers(count, library, sleeping=True))


# -- the peers ------------------------------------------------------------------------------------------------------------


@contestant("Fabric", needs="lightning")
def fabric(task: Task) -> Round:
    from lightning.fabric import Fabric

    runner = Fabric(accelerator="cpu")
    model, optimizer = runner.setup(task.model, task.optimizer)

    def run() -> None:
        model.train()
        for batch in task.batches:
            optimizer.zero_grad()
            x, y = runner.to_device(batch)
            loss = task.loss_fn(model(x), y)
            runner.backward(loss)
            optimizer.step()
            loss = loss.detach()

    return run


def lightning_rounds(task: Task, **options: Any) -> Round:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            x, y = batch
            loss = task.loss_fn(self.model(x), y)
            if options.get("logger"):
                self.log("train/loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            if "gradient_clip_val" not in options:
                return task.optimizer
            return {"optimizer": task.optimizer, "lr_scheduler": {"scheduler": task.scheduler, "interval": "step"}}

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}

    def run() -> None:
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, **{**quiet, **options})
        trainer.fit(module, task.batches)

    return run


@contestant("Lightning", needs="lightning")
def lightning(task: Task) -> Round:
    return lightning_rounds(task)


@contestant("Lightning, accumulating", needs="lightning")
def lightning_accumulating(task: Task) -> Round:
    return lightning_rounds(task, accumulate_grad_batches=WINDOW)


@contestant("Lightning, clip + schedule", needs="lightning")
def lightning_clipping(task: Task) -> Round:
    return lightning_rounds(task, gradient_clip_val=1.0)


@contestant("Lightning, TensorBoard + bar", needs="lightning")
def lightning_logging(task: Task) -> Round:
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(os.fspath(task.folder))
    return lightning_rounds(task, logger=logger, log_every_n_steps=LOG_EVERY, enable_progress_bar=True)


def accelerate_rounds(task: Task, window: int) -> Round:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
    model, optimizer = accelerator.prepare(task.model, task.optimizer)

    def run() -> None:
        model.train()
        for x, y in task.batches:
            with accelerator.accumulate(model):
                x, y = x.to(accelerator.device, non_blocking=True), y.to(accelerator.device, non_blocking=True)
                loss = task.loss_fn(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                loss = loss.detach()

    return run


@contestant("Accelerate", needs="accelerate")
def accelerate(task: Task) -> Round:
    return accelerate_rounds(task, 1)


@contestant("Accelerate, accumulating", needs="accelerate")
def accelerate_accumulating(task: Task) -> Round:
    return accelerate_rounds(task, WINDOW)


@contestant("Poutyne", needs="poutyne")
def poutyne(task: Task) -> Round:
    from poutyne import Model

    model = Model(task.model, task.optimizer, task.loss_fn)
    return lambda: model.fit_generator(task.batches, epochs=1, verbose=False)


@contestant("TNT", needs="torchtnt")
def torchtnt(task: Task) -> Round:
    from torchtnt.framework.train import train
    from torchtnt.framework.unit import TrainUnit

    class Unit(TrainUnit[Any]):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer = task.model, task.optimizer

        def train_step(self, state: Any, data: Any) -> torch.Tensor:
            x, y = data
            self.optimizer.zero_grad()
            x, y = x.to(task.device, non_blocking=True), y.to(task.device, non_blocking=True)
            loss = task.loss_fn(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            return loss.detach()

    return lambda: train(Unit(), task.batches, max_epochs=1)


@contestant("skorch", needs="skorch")
def skorch(task: Task) -> Round:
    from skorch import NeuralNet

    net = NeuralNet(
        lambda: task.model,
        criterion=nn.CrossEntropyLoss,
        optimizer=lambda parameters, lr: task.optimizer,
        max_epochs=1,
        iterator_train=lambda dataset, **_: task.batches,
        train_split=None,
        callbacks=None,
        verbose=0,
    ).initialize()
    x, y = task.batches[0]
    return lambda: net.partial_fit(x, y)


@contestant("Keras", needs="keras")
def keras(task: Task) -> Round:
    """Keras's own layers and optimizer on torch, with the task's weights: its loop trains no other module as it is."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    linears = [layer for layer in task.model if isinstance(layer, nn.Linear)]
    last = linears[-1]
    layers = [keras.layers.Dense(linear.out_features, None if linear is last else "relu") for linear in linears]
    model = keras.Sequential([keras.layers.Input((linears[0].in_features,)), *layers])
    for layer, linear in zip(layers, linears, strict=True):
        layer.set_weights([linear.weight.detach().T.numpy(), linear.bias.detach().numpy()])
    model.compile(
        optimizer=keras.optimizers.SGD(learning_rate=0.01, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def run() -> None:
        model.fit(iter(task.batches), steps_per_epoch=len(task.batches), epochs=1, verbose=0)
        for layer, linear in zip(layers, linears, strict=True):
            weight, bias = (torch.as_tensor(w) for w in layer.get_weights())
            linear.weight.data, linear.bias.data = weight.T, bias

    return run


@contestant("fastai", needs="fastai")
def fastai(task: Task) -> Round:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    loaders = DataLoaders(task.batches, [], device=task.device)
    optimizer = OptimWrapper(opt=task.optimizer)
    learner = Learner(loaders, task.model, loss_func=task.loss_fn, opt_func=optimizer, lr=0.01)

    def run() -> None:
        with learner.no_logging():
            learner.fit(1)

    return run


@contestant("Composer", needs="composer")
def composer(task: Task) -> Round:
    from composer import ComposerModel, Trainer

    class Model(ComposerModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def forward(self, batch: Any) -> torch.Tensor:
            return self.model(batch[0])

        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return task.loss_fn(outputs, batch[1])

    trainer = Trainer(
        model=Model(),
        optimizers=task.optimizer,
        train_dataloader=task.batches,
        device_train_microbatch_size=len(task.batches[0][0]),
        device="cpu",
        progress_bar=False,
    )
    return lambda: trainer.fit(duration="1ep")
