"""The text of ``trainer.explain(speed=True)``: what would make a run faster, as code to type, with the measured speed-up."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from camshaft.cudagraphs.graphs import CAPTURERS
from camshaft.data.prefetch import Prefetch
from camshaft.distributed.collectives import world_size
from camshaft.distributed.dtensors import is_dtensor
from camshaft.models import is_compiled
from camshaft.optimizers import has_own_zero_grad
from camshaft.protocols import PhaseLike, TrainerLike
from camshaft.reports.timing import (
    Measure,
    Speedup,
    measured,
    parameters_of,
    supports_kernel,
    time_kernel,
    time_passes,
    time_worker_start,
)

__all__ = ["Advice", "about_data", "about_kernel", "is_quick_at_bf16", "speed_report"]


@dataclass(frozen=True)
class Advice:
    """A setting that would make the run faster, or that is in use already."""

    suggestion: str
    """What to type."""
    why: str = ""
    """What in this run it improves."""
    measure: Measure | str = "not measured"
    """Measures the speed-up; or says why that is not possible."""
    enabled: bool = False


def speed_report(trainer: TrainerLike) -> str:
    """Says what would make this run faster, and changes nothing. See :meth:`Trainer.explain`."""
    data, primary = trainer.state.dataloader, trainer.primary
    found = [advice for phase in trainer.phases.values() for advice in about_phase(trainer, phase)]
    found += about_data(data, primary.device, copies_in_background(primary), trainer.state.max_epochs)
    found += about_process(primary.device, [phase.module for phase in trainer.phases.values()])
    suggested, useless = [], []
    for advice in (advice for advice in found if not advice.enabled):
        gain = measured(advice.measure)
        if isinstance(gain, Speedup) and not gain.is_worth_it:
            useless.append(f"measured, no gain: {advice.suggestion} ({advice.why}; {gain})")
        else:
            suggested += [f"  {advice.suggestion}", f"      {advice.why}; {gain}"]
    enabled = ", ".join(dict.fromkeys(advice.suggestion for advice in found if advice.enabled))
    lines = ["what would make this run faster:", *(suggested or ["  no suggestion"]), *useless]
    lines += [f"enabled already: {enabled}"] if enabled else []
    lines += ["the data is not known before the first run, so that nothing is suggested for its loader"] if data is None else []
    return "\n".join(lines)


# -- optimizers and networks ----------------------------------------------------------------------------------------------


def about_phase(trainer: TrainerLike, phase: PhaseLike) -> Iterator[Advice]:
    """Suggestions for the optimizers and the network of a phase."""
    label = f"{phase.name}: " if len(trainer.phases) > 1 else ""
    sparse = {
        id(p) for part in phase.module.modules() if getattr(part, "sparse", False) for p in part.parameters(recurse=False)
    }
    for optimizer in phase.optimizers:
        yield from about_clearing(optimizer, label)
        if not sparse.intersection(map(id, parameters_of(optimizer))):
            yield from about_kernel(optimizer, label)
    yield from about_convolutions(trainer, phase, label)
    yield from about_precision(trainer, phase, label)
    yield from about_compiling(phase, label)
    yield from about_capture(phase)


def about_clearing(optimizer: Optimizer, label: str = "") -> Iterator[Advice]:
    """A ``zero_grad`` that an optimizer overrides; otherwise the step clears gradients itself."""
    name = type(optimizer).__name__
    if has_own_zero_grad(optimizer):
        why = f"{label}{name} overrides zero_grad, which is called for every step; let it set .grad to None, or remove it"
        yield Advice("zero_grad(set_to_none=True)", why, "not measured: its effect is unknown")


def about_kernel(optimizer: Optimizer, label: str = "") -> Iterator[Advice]:
    """The fused kernels of torch's optimizers, or else the multi-tensor ones (``foreach``)."""
    name, held = type(optimizer).__name__, parameters_of(optimizer)
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    kernel = next((kernel for kernel in ("fused", "foreach") if supports_kernel(optimizer, kernel)), None)
    if kernel is None:
        return
    suggestion, settings = f"torch.optim.{name}(..., {kernel}=True)", {group[kernel] for group in optimizer.param_groups}
    by_default = kernel == "foreach" and held[0].device.type != "cpu"  # torch uses it there by default
    if settings <= ({True, None} if by_default else {True}):
        yield Advice(suggestion, enabled=True)
    else:
        why = f"{label}{name} steps {len(held)} tensors on {held[0].device.type} without it"
        yield Advice(suggestion, why, lambda: time_kernel(optimizer, kernel))


def about_convolutions(trainer: TrainerLike, phase: PhaseLike, label: str) -> Iterator[Advice]:
    """The memory format for which convolutions are optimized."""
    if phase.device.type not in ("cpu", "cuda"):
        return
    for dimensions, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        weights = [weight for weight in kernels(phase.module) if weight.dim() == dimensions]
        suggestion = f"model.to(memory_format={layout})"
        if not all(weight.is_contiguous(memory_format=layout) for weight in weights):
            why = f"{label}its convolutions ({len(weights)} on {phase.device.type}) are in the channels-first format"
            change = lambda module, layout=layout: module.to(memory_format=layout)  # noqa: E731
            yield Advice(suggestion, why, lambda change=change: time_passes(trainer.state, phase, change))  # type: ignore[misc]
        elif not all(weight.is_contiguous() for weight in weights):  # a kernel of one by one is laid out both ways
            yield Advice(suggestion, enabled=True)


def kernels(module: nn.Module) -> list[torch.Tensor]:
    """The weights of a network's convolutions, unless they are sharded or have no shape yet."""
    weights = [part.weight for part in module.modules() if isinstance(part, nn.modules.conv._ConvNd)]
    return [weight for weight in weights if not is_lazy(weight) and not is_dtensor(weight)]


def about_precision(trainer: TrainerLike, phase: PhaseLike, label: str) -> Iterator[Advice]:
    """Mixed precision, if the device has instructions for it."""
    if phase.precision.dtype is not None:
        name = str(phase.precision.dtype).removeprefix("torch.")
        yield Advice(f"{label}mixed precision in {name}", enabled=True)
    elif has_matrices(phase.module) and is_quick_at_bf16(phase.device):
        why = f"{label}everything is in float32, but the device supports bfloat16; results are rounded differently"
        measure = lambda: time_passes(trainer.state, phase, dtype=torch.bfloat16)  # noqa: E731
        yield Advice('MixedPrecision("bf16").attach(trainer)', why, measure)


def has_matrices(module: nn.Module) -> bool:
    """Whether a network multiplies matrices in float32."""
    return any(p.dtype is torch.float32 and not is_lazy(p) and p.dim() > 1 for p in module.parameters())


def is_quick_at_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, and does not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in instructions)


def about_compiling(phase: PhaseLike, label: str) -> Iterator[Advice]:
    """``torch.compile`` if there is a compiler and the network can go through it."""
    suggestion = "torch.compile(model)"
    if is_compiled(phase.module):
        yield Advice(suggestion, enabled=True)
        return
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in phase.module.modules())
    penalized = phase.objective.has_penalties  # a second derivative can't be compiled
    if not scripted and not penalized and has_compiler(phase.device):
        why = f"{label}{type(phase.module).__name__} runs one operation at a time; compile it before you make the optimizer"
        yield Advice(suggestion, why, "not measured: compiling takes longer than many steps")


def about_capture(phase: PhaseLike) -> Iterator[Advice]:
    """CUDA graphs, if ``create_trainer`` has made the phase."""
    if phase.objective.can_be_captured and phase.device.type in CAPTURERS and world_size() == 1:
        why = "each operation of a step is launched separately; for batches of one shape"
        not_measured = "not measured: capturing takes longer than many steps"
        yield Advice("create_trainer(..., capture=True)", why, not_measured, bool(phase.execution.describe()))


def has_compiler(device: torch.device) -> bool:
    """Whether the compiler that ``torch.compile`` needs is installed."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and any(shutil.which(os.environ.get("CXX", name)) for name in ("g++", "clang++"))


# -- data -----------------------------------------------------------------------------------------------------------------


def copies_in_background(phase: PhaseLike) -> bool:
    """Whether a phase's batches are copied with ``non_blocking``."""
    own = phase.objective.non_blocking
    return phase.non_blocking if own is None else own


def about_data(data: Any, device: torch.device, non_blocking: bool, epochs: int | None) -> Iterator[Advice]:
    """Suggestions for the data loader of the run.

    Args:
        data: the data of the run; ``None`` if it is not known yet.
        device: the device of its batches.
        non_blocking: whether they are copied with ``non_blocking``.
        epochs: the number of epochs of the run.
    """
    prefetched = isinstance(data, Prefetch)
    loader = data.loader if prefetched else data
    if isinstance(loader, DataLoader):
        yield from about_workers(loader, epochs)
    if device.type != "cuda" or data is None:
        return
    if isinstance(loader, DataLoader):
        why = "batches are in memory that is not pinned, so that the step waits for each copy to the GPU"
        yield Advice("DataLoader(..., pin_memory=True)", why, enabled=bool(loader.pin_memory))
        if loader.pin_memory and not non_blocking:
            yield Advice("non_blocking=True", "batches are pinned, but the step still waits for each copy to the GPU")
    yield Advice("Prefetch(loader, device)", "each batch is copied only when its step begins", enabled=prefetched)


def about_workers(loader: DataLoader[Any], epochs: int | None) -> Iterator[Advice]:
    """The worker processes of a loader."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if loader.num_workers == 0:
        if cores > 1 and not isinstance(loader.dataset, IterableDataset):  # each worker would return all of its samples
            why = "each batch is loaded by the training process, while the step waits"
            measure = "not measured: that would draw from your data; see Ignite's BasicTimeProfiler"
            yield Advice(f"DataLoader(..., num_workers={min(cores - 1, 4)})", why, measure)
        return
    suggestion, why = (
        "DataLoader(..., persistent_workers=True)",
        f"{loader.num_workers} worker processes are started again for each epoch",
    )
    if loader.persistent_workers or epochs != 1:
        yield Advice(suggestion, why, lambda: time_worker_start(loader), loader.persistent_workers)


# -- the process ----------------------------------------------------------------------------------------------------------


def about_process(device: torch.device, modules: Sequence[nn.Module]) -> Iterator[Advice]:
    """Settings of the whole process, which a measurement must not change."""
    not_measured = "not measured: a setting of the whole process"
    if torch.is_anomaly_enabled():
        why = "every operation is recorded and every gradient is checked for NaN"
        yield Advice("torch.autograd.set_detect_anomaly(False)", why, not_measured)
    if device.type != "cuda" or torch.version.hip:
        return
    if torch.cuda.get_device_capability(device) >= (8, 0) and any(has_matrices(module) for module in modules):
        why = "float32 matrices are multiplied without tensor cores; results are rounded differently"
        yield Advice('torch.set_float32_matmul_precision("high")', why, not_measured, not is_in_full_float32())
    if any(kernels(module) for module in modules) and not torch.are_deterministic_algorithms_enabled():
        why = "convolutions use a heuristic choice of algorithm, not the fastest one; for batches of one shape"
        if not torch.backends.cudnn.deterministic:
            yield Advice("torch.backends.cudnn.benchmark = True", why, not_measured, torch.backends.cudnn.benchmark)


def is_in_full_float32() -> bool:
    """Whether TF32 is disabled for matrix products."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through torch's newer settings, with which the older ones can't be mixed
        return False
