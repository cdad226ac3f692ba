"""Measures the speed-up of a setting in a few paired rounds, on copies, so that the run does not change."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks
from torch.utils.data import DataLoader

from camshaft.distributed.collectives import world_size
from camshaft.distributed.dtensors import is_dtensor
from camshaft.models import is_compiled, unwrap
from camshaft.protocols import PhaseLike
from camshaft.pytree import map_tensors, tensors
from camshaft.rng import preserve_rng_state

__all__ = [
    "Measure",
    "Speedup",
    "measured",
    "paired",
    "parameters_of",
    "supports_kernel",
    "time_kernel",
    "time_passes",
    "time_worker_start",
]

MIN_ROUNDS, MAX_ROUNDS, MAX_SECONDS = 3, 21, 1.0
"""The number of paired rounds of a measurement: as many as start within ``MAX_SECONDS``."""
MAX_COPIED_BYTES = 2**30
"""The maximum size of the copies of a measurement if the free memory is unknown."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Speedup:
    """A speed-up: quartiles over paired rounds, and the median seconds before and after."""

    low: float
    median: float
    high: float
    before: float
    after: float

    @property
    def is_worth_it(self) -> bool:
        """Whether it is more than noise."""
        return self.low > 1 and self.median >= 1.05

    def __str__(self) -> str:
        times = f"{self.median:.2f} times as fast (quartiles {self.low:.2f} to {self.high:.2f})"
        return f"measured {times}, {self.before * 1e6:.0f} us becomes {self.after * 1e6:.0f} us"


Measure = Callable[[], "Speedup | str"]


def measured(measure: Measure | str) -> Speedup | str:
    """The speed-up, or the reason why it is unknown.

    The random generators keep their states, and an error on a copy does not end a run.
    """
    if isinstance(measure, str):
        return measure
    if world_size() > 1:
        return "not measured: with several processes, the others would wait for this one"
    try:
        with preserve_rng_state(), torch.inference_mode(False), torch.enable_grad():
            return measure()
    except Exception as error:  # out of memory, or a network that can't be copied or changed
        return f"not measured: {type(error).__name__}: {(str(error).splitlines() or [''])[0]:.120}"


def paired(baseline: Callable[[], Any], other: Callable[[], Any], device: torch.device) -> Speedup:
    """Times two ways to do the same thing in turns, so that other load on the machine affects both."""
    for function in (baseline, other) * 2:  # the first calls allocate memory and choose kernels
        function()
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < MIN_ROUNDS or (len(pairs) < MAX_ROUNDS and time.perf_counter() - began < MAX_SECONDS):
        if len(pairs) % 2:  # take turns in going first
            after = seconds(other, device)
            pairs.append((seconds(baseline, device), after))
        else:
            pairs.append((seconds(baseline, device), seconds(other, device)))
    low, median, high = statistics.quantiles([before / after for before, after in pairs], n=4)
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Speedup(low, median, high, before, after)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The duration of a call, until the device has finished it."""
    wait = (lambda _: None) if device.type == "cpu" else torch.accelerator.synchronize
    wait(device)
    began = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - began


# -- an optimizer's step --------------------------------------------------------------------------------------------------


def supports_kernel(optimizer: Optimizer, kernel: str) -> bool:
    """Whether an optimizer has a kernel (``"fused"``, ``"foreach"``) for its parameters, tried on tensors of one element."""
    held = parameters_of(optimizer)
    if kernel not in optimizer.defaults or any(p.grad is not None and p.grad.is_sparse for p in held):
        return False
    try:
        with torch.inference_mode(False), no_step_hooks():
            tiny = {id(p): torch.zeros(1, dtype=p.dtype, device=p.device, requires_grad=True) for p in held}
            for tensor in tiny.values():
                tensor.grad = torch.zeros_like(tensor)
            rebuild_optimizer(optimizer, tiny, kernel).step()
    except (AssertionError, RuntimeError, ValueError):  # differentiable=True, or no kernel for the device or the dtype
        return False
    return True


def time_kernel(optimizer: Optimizer, kernel: str) -> Speedup | str:
    """Compares the optimizer's step with the same step by another kernel, on copies of its parameters and gradients."""
    held = parameters_of(optimizer)
    device = held[0].device
    needed = 6 * sum(p.numel() * p.element_size() for p in held)  # with gradients, and two states for each of two copies
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else MAX_COPIED_BYTES
    if needed > room:
        return f"not measured: copies of {len(held)} tensors would take {needed / 2**30:.1f} GiB"
    trained = [
        p for p in held if p.requires_grad or p.grad is not None
    ] or held  # all of them may be frozen for another network's turn
    copies = {id(p): p.detach().clone().requires_grad_() for p in trained}
    for p in trained:
        copies[id(p)].grad = torch.randn_like(p) if p.grad is None else p.grad.detach().clone()
    with no_step_hooks():
        return paired(rebuild_optimizer(optimizer, copies).step, rebuild_optimizer(optimizer, copies, kernel).step, device)


@contextmanager
def no_step_hooks() -> Iterator[None]:
    """Disables the hooks on every optimizer's step inside the block."""
    tables: list[dict[int, Any]] = [optimizer_hooks._global_optimizer_pre_hooks, optimizer_hooks._global_optimizer_post_hooks]
    hooks = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, own in zip(tables, hooks, strict=True):
            table.update(own)


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Every parameter that an optimizer holds."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def rebuild_optimizer(optimizer: Optimizer, copies: dict[int, torch.Tensor], kernel: str | None = None) -> Optimizer:
    """An optimizer of the same class and settings over copies, with its own kernel or with another."""
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    kernels: dict[str, Any] = {}
    if kernel is not None:
        kernels = {key: key == kernel for key in ("fused", "foreach") if key in defaults}
    groups = [
        {key: group[key] for key in defaults}
        | kernels
        | {"params": [copies[id(p)] for p in group["params"] if id(p) in copies]}
        for group in optimizer.param_groups
    ]
    return type(optimizer)([group for group in groups if group["params"]], **defaults | kernels)


# -- a network's passes ---------------------------------------------------------------------------------------------------


def time_passes(
    state: Any,
    phase: PhaseLike,
    change: Callable[[nn.Module], nn.Module] = lambda module: module,
    dtype: torch.dtype | None = None,
) -> Speedup | str:
    """Compares forward and backward over the last batch with the same after a change, or with mixed precision, on two copies.

    Args:
        state: the trainer's state, for the batch.
        phase: the phase whose network is copied.
        change: called with the second copy.
        dtype: the precision of the second copy's autocast if it isn't the phase's.
    """
    inputs, module = inputs_of(state, phase), phase.module
    if isinstance(inputs, str):
        return inputs
    if unwrap(module) is not module or any(is_dtensor(p) for p in module.parameters()):
        return f"not measured: the network is wrapped ({type(module).__name__})"
    if is_compiled(module):
        return "not measured: parts of the network are compiled, and a change would compile them again"
    parts = [*module.modules(), module_hooks]
    if any(getattr(part, name, None) for part in parts for name in (*HOOKS, *(f"_global{hook}" for hook in HOOKS))):
        return "not measured: the network has hooks, which its copies would call"
    own = phase.precision.dtype
    baseline = round_trip(copy.deepcopy(module), inputs, phase.device, own)
    return paired(baseline, round_trip(change(copy.deepcopy(module)), inputs, phase.device, dtype or own), phase.device)


def inputs_of(state: Any, phase: PhaseLike) -> Sequence[Any] | str:
    """Copies of the arguments of the network's last call; or the reason why they are unknown."""
    inputs = phase.objective.inputs(state)
    if inputs is None:
        return "not measured: only the objective knows the arguments of the network"
    if inputs[0] is None:
        return "not measured: no batch has been seen yet"
    return [map_tensors(lambda tensor: tensor.detach().clone(), part) for part in inputs]


def round_trip(module: nn.Module, inputs: Sequence[Any], device: torch.device, dtype: torch.dtype | None) -> Callable[[], None]:
    """A function to be timed: a forward pass, and the backward pass of the sum of its outputs."""
    parameters = list(module.parameters())
    if not any(p.requires_grad for p in parameters):  # frozen for another network's turn
        module.requires_grad_()

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            outputs = module(*inputs)
        sums = [output.float().sum() for output in tensors(outputs) if output.requires_grad]
        torch.autograd.backward(torch.stack(sums).sum())

    return run


# -- a loader's workers ---------------------------------------------------------------------------------------------------


def time_worker_start(loader: DataLoader[Any]) -> str:
    """Times the start and the end of a loader's worker processes, with data that takes no time."""
    context = loader.multiprocessing_context
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if (method if context is None else context.get_start_method()) != "fork":
        return "not measured: the workers would import your script again"
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in DataLoader(range(loader.num_workers), num_workers=loader.num_workers, multiprocessing_context=context):  # type: ignore[arg-type]
            pass
        times.append(time.perf_counter() - began)
    return f"measured {statistics.median(times) * 1e3:.0f} ms an epoch"
