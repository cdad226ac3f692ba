"""What the scenarios of the distributed tests share: their registry, data, models, trainers and comparisons.

A scenario is a function that every rank runs. What it returns is saved for the test, for each rank.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp as torch_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from camshaft import create_trainer

SAMPLES, FEATURES, CLASSES = 84, 6, 3
OUTPUT = Path(os.environ.get("SCENARIO_OUTPUT", "."))
"""The folder of the results."""


@dataclass(frozen=True)
class Scenario:
    """A scenario, the numbers of processes that run it, and whether it ends them or disturbs later ones."""

    function: Callable[[], Any]
    world_sizes: tuple[int, ...]
    alone: bool


SCENARIOS: dict[str, Scenario] = {}


def scenario(*world_sizes: int, alone: bool = False) -> Any:
    """Registers a scenario for some numbers of processes; by default for two."""

    def register(function: Any) -> Any:
        SCENARIOS[function.__name__] = Scenario(function, world_sizes or (2,), alone)
        return function

    return register


# -- ranks ----------------------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_last_rank() -> bool:
    return rank() == world_size() - 1


def from_rank_zero(value: Any) -> Any:
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


# -- data -----------------------------------------------------------------------------------------------------------------


def dataset() -> TensorDataset:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, FEATURES, generator=source, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (SAMPLES,), generator=source))


def loader(samples: int = 12, shuffle: bool = False) -> DataLoader:
    """Batches of ``samples`` over all ranks together: the same global batches for any number of processes."""
    if world_size() == 1:
        return DataLoader(dataset(), samples, shuffle=shuffle)
    sampler = DistributedSampler(dataset(), shuffle=shuffle, seed=1)
    return DataLoader(dataset(), samples // world_size(), sampler=sampler)


class UnsizedData:
    """Batches without a length, which can be iterated again."""

    def __init__(self, batches: Any) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


# -- models and trainers --------------------------------------------------------------------------------------------------


def plain_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def shifted_model() -> nn.Module:
    """The same model with other weights."""
    model = plain_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if world_size() > 1 else model


def fully_shard(module: nn.Module) -> nn.Module:
    """Torch's function on the CPU. Without a mesh it takes the device for which torch was built, even if there is none."""
    return torch_fsdp.fully_shard(module, mesh=init_device_mesh("cpu", (world_size(),)))


def fsdp(model: nn.Module) -> nn.Module:
    """Shards each layer, and the model."""
    if world_size() > 1:
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer)
        fully_shard(model)
    return model


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trainer_of(model: nn.Module, **settings: Any) -> Any:
    loss_fn = None if "compute_loss" in settings else nn.functional.cross_entropy
    return create_trainer(model, sgd(model), loss_fn, **settings)


def loss_without_class_zero(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, ignore_index=0)


# -- comparisons ----------------------------------------------------------------------------------------------------------


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    inner = getattr(model, "module", model)
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in inner.named_parameters()}


def max_difference(one: Any, other: Any) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return max_difference(full_weights(one), full_weights(other)) == 0.0


def error_of(action: Any) -> str:
    """The type and the text of the error that an action raises, or "none"."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def raise_on_every_rank() -> None:
    raise ValueError("on every rank")
