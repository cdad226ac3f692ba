"""Callbacks in the style of Keras and Poutyne: their methods, the model they see, and the logs they receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from camshaft.distributed.collectives import all_reduce, world_size
from camshaft.models import unwrap

__all__ = ["Logs", "METHODS", "ModelView", "base_library", "is_number", "losses_of", "means", "methods_of"]

METHODS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_backward_end",
    "on_train_batch_end",
    "on_epoch_end",
    "on_train_end",
)
"""The methods of a callback that are called, in the order of a run."""

OLD_NAMES = {"on_train_batch_begin": "on_batch_begin", "on_train_batch_end": "on_batch_end"}
"""Keras's older names, called if a callback does not have the newer ones."""

LIBRARIES = ("keras", "poutyne", "tf_keras")
"""The libraries whose base class ``Callback`` defines every method as one that does nothing."""


def methods_of(callback: Any) -> dict[str, Callable[..., Any]]:
    """The methods that a callback implements, by the names in :data:`METHODS`."""
    found = {name: method_of(callback, name) or method_of(callback, OLD_NAMES.get(name, name)) for name in METHODS}
    return {name: method for name, method in found.items() if method is not None}


def method_of(callback: Any, name: str) -> Callable[..., Any] | None:
    """One method of a callback; ``None`` if it is missing or inherited from its library's empty base class."""
    method = getattr(callback, name, None)
    if not callable(method):
        return None
    owner = next((cls for cls in type(callback).__mro__ if name in vars(cls)), None)
    inherited = owner is not None and owner.__name__ == "Callback" and library(owner) in LIBRARIES
    return None if inherited and name not in vars(callback) else method


def library(cls: type) -> str:
    """The top-level package that defines a class."""
    return cls.__module__.partition(".")[0]


def base_library(callback: Any) -> str:
    """The style of a callback: ``"poutyne"`` if one of its base classes is from Poutyne, otherwise ``"keras"``."""
    return "poutyne" if "poutyne" in map(library, type(callback).__mro__) else "keras"


class ModelView:
    """The model that a callback sees: the network, and the attributes that Keras and Poutyne add to it.

    Args:
        phase: the phase of the network.
        metrics_names: the names of the metrics, for Poutyne's loggers.
    """

    def __init__(self, phase: Any, metrics_names: list[str]) -> None:
        self.network = unwrap(phase.module)
        self.optimizer, self.device, self.metrics_names = phase.optimizers[0], phase.device, metrics_names
        self.stop_training = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        network = vars(self).get("network")
        try:
            return getattr(network, name)
        except AttributeError:
            raise AttributeError(
                f"the model that KerasStyle passes to a callback has no {name!r}: it has network, optimizer, device, "
                f"metrics_names, stop_training, and the attributes of {type(network).__name__}"
            ) from None


class Logs(MutableMapping[str, Any]):
    """The logs of a batch. A tensor becomes a number when it is read, so that the host waits for the device only then.

    Args:
        values: the entries, as numbers or tensors of one element.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, torch.Tensor):
            self._values[key] = value = value.item()
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict[str, Any]:
        """All entries as a plain dict of numbers."""
        return dict(self)


def losses_of(engine: Any) -> dict[str, Any]:
    """The losses of this iteration: ``loss`` and the named ones; only the named ones if there are several phases."""
    state = engine.state
    named = {name: value for name, value in state.losses.items() if is_number(value)}
    return {"loss": state.loss} | named if len(engine.phases) == 1 else named


def means(totals: Mapping[str, Any], samples: int) -> dict[str, float]:
    """The means of sums over samples; with several processes over the samples of all of them.

    Args:
        totals: the sum of each loss over the samples of this process.
        samples: the number of samples of this process.
    """
    if world_size() == 1 or not totals:
        return {name: float(total) / samples for name, total in totals.items()}
    device = next((total.device for total in totals.values() if isinstance(total, torch.Tensor)), None)
    parts = [torch.as_tensor(part).to(device, torch.float64).reshape(()) for part in (*totals.values(), samples)]
    summed = torch.stack(parts)
    all_reduce(summed)
    *sums, samples = summed.tolist()
    return {name: total / samples for name, total in zip(totals, sums, strict=True)}


def is_number(value: Any) -> bool:
    """Whether a value is a single number: a Python number, or a tensor of one element."""
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
