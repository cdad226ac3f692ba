"""``create_evaluator``: makes an engine that evaluates a model without side effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, State
from ignite.metrics import Metric
from torch import nn

from camshaft.distributed.collectives import all_gather_object, broadcast, until_any_rank_is_exhausted, world_size
from camshaft.distributed.dtensors import is_dtensor
from camshaft.engines.loop import LoopEngine
from camshaft.models import ddp_wrapper, is_sharded, preserve_training_mode
from camshaft.precision import precision_for
from camshaft.pytree import prepare_pair
from camshaft.resume.data_position import length_of
from camshaft.rng import preserve_rng_state
from camshaft.validation import check_device, check_no_class, check_prepare, describe_type, name_of

__all__ = ["create_evaluator"]


def create_evaluator(
    model: nn.Module,
    metrics: Mapping[str, Metric] | None = None,
    *,
    device: torch.device | str | None = None,
    non_blocking: bool = True,
    amp: str | torch.dtype | None = None,
    prepare_batch: Callable[..., tuple[Any, Any]] = prepare_pair,
    model_transform: Callable[[Any], Any] | None = None,
    output_transform: Callable[[Any, Any, Any], Any] | None = None,
) -> Engine:
    """Makes an engine that runs a model over data in inference mode and computes metrics.

    The training flag of every submodule and every random generator are restored after the run, even if it fails. Frozen
    BatchNorm layers stay frozen. With several processes each rank evaluates its part of the data, with the buffers of rank 0.
    Under ``fully_shard`` all ranks need the same number of batches; data of unknown length ends with that of rank 0.

    Args:
        model: the network, on its device.
        metrics: Ignite metrics by name; they get the result of ``output_transform``.
        device: the device of the batches; by default that of the model's parameters.
        non_blocking: lets copies from pinned memory overlap with computation.
        amp: ``None``, ``"bf16"``, ``"fp16"`` or the ``torch.dtype``.
        prepare_batch: called as ``prepare_batch(batch, device=..., non_blocking=...)``; returns ``(x, y)`` on the device.
        model_transform: applied to the model's output.
        output_transform: called with ``(x, y, y_pred)``; returns ``state.output``. By default ``(y_pred, y)``.

    Returns:
        The engine; ``engine.run(loader).metrics`` are the results.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the model is on another device.

    Example:
        >>> from ignite.metrics import Accuracy
        >>> evaluator = create_evaluator(torch.nn.Linear(8, 3), metrics={"accuracy": Accuracy()})
        >>> metrics = evaluator.run([(torch.randn(4, 8), torch.randint(3, (4,)))]).metrics
        >>> sorted(metrics)
        ['accuracy']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe_type(model)}")
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a mapping of names to Ignite metrics, got {type(metrics).__name__}")
    check_prepare(prepare_batch)
    for argument, function in (("model_transform", model_transform), ("output_transform", output_transform)):
        if function is not None and not callable(function):
            raise TypeError(f"{argument} must be callable, got {function!r}")
    check_no_class(model_transform, "model_transform", "a function of the model's output", nn.Module)
    wrapper = ddp_wrapper(model)
    if wrapper is not None:
        model = wrapper.module  # the forward pass of DDP would synchronize the processes at every batch
    target = check_device(device, model)
    autocast = precision_for(amp, target).autocast

    def evaluate(engine: Engine, batch: Any) -> Any:
        state = engine.state
        pair = prepare_batch(batch, device=target, non_blocking=non_blocking)
        try:
            x, y = pair
        except (TypeError, ValueError):
            raise TypeError(f"prepare_batch ({name_of(prepare_batch)}) must return (x, y), got {pair!r:.200}") from None
        with autocast:
            y_pred = model(x)
        if model_transform is not None:
            y_pred = model_transform(y_pred)
        state.x, state.y, state.y_pred = x, y, y_pred  # type: ignore[attr-defined]
        return (y_pred, y) if output_transform is None else output_transform(x, y, y_pred)

    evaluator = Evaluator(evaluate, model)
    for name, metric in (metrics or {}).items():
        if not isinstance(metric, Metric):
            raise TypeError(f"metrics[{name!r}] must be an ignite.metrics.Metric, got {describe_type(metric)}")
        metric.attach(evaluator, name)
    return evaluator


class Evaluator(LoopEngine):
    """An engine that runs a model in eval and inference mode, and restores training flags and random state."""

    def __init__(self, process_function: Callable[[Engine, Any], Any], model: nn.Module) -> None:
        super().__init__(process_function)
        self.model = model
        self._ends_together = self._has_learned = False

    def run(self, *args: Any, **kwargs: Any) -> State:
        """Evaluates over the data, as :meth:`ignite.engine.Engine.run` runs."""
        if self._has_learned and self._internal_run_generator is None:  # the data may be another, or longer
            self.state.epoch_length, self._has_learned = None, False
        self._ends_together = False
        sharded = is_sharded(self.model)
        if world_size() > 1:
            self._synchronize(args[0] if args else kwargs.get("data"), kwargs.get("epoch_length"), sharded)
        # FSDP2 creates the tensors for training in the first pass; they must not be inference tensors
        with preserve_training_mode(self.model), preserve_rng_state(), torch.no_grad() if sharded else torch.inference_mode():
            self.model.eval()
            return super().run(*args, **kwargs)

    def _synchronize(self, data: Any, epoch_length: int | None, sharded: bool) -> None:
        """Broadcasts the buffers (BatchNorm's statistics) of rank 0, as DDP does before a step.

        FSDP2 needs every rank for each batch, so data of unknown length must end on all of them at the same time.

        Raises:
            ValueError: if some ranks would wait forever for the others.
        """
        broadcast(buffer for buffer in self.model.buffers() if not is_dtensor(buffer))
        if not sharded:
            return
        lengths = all_gather_object(length_of(data) if epoch_length is None else epoch_length)
        if len(set(lengths)) > 1:
            raise ValueError(
                f"a model under fully_shard takes every process for each batch, but they have {lengths} batches to evaluate; "
                "give each as many (DistributedSampler does)"
            )
        self._ends_together = lengths[0] is None

    def _setup_dataloader_iter(self) -> None:
        super()._setup_dataloader_iter()
        if self._ends_together and self._dataloader_iter is not None:
            self._dataloader_iter = until_any_rank_is_exhausted(self._dataloader_iter)

    def _learn_epoch_length(self, length: int) -> None:
        super()._learn_epoch_length(length)
        self._has_learned = True
