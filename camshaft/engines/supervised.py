"""``create_trainer``: makes a trainer of a model, an optimizer and a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from camshaft.cudagraphs.wrap import CudaGraphExecution
from camshaft.engines.phase import Phase
from camshaft.engines.shorthand import attach_schedulers, attach_settings
from camshaft.engines.trainer import Trainer
from camshaft.handlers.lr_scheduling import check_every
from camshaft.objective import Objective
from camshaft.pytree import detach, prepare_pair
from camshaft.validation import check_no_class, check_prepare, name_of

__all__ = ["Custom", "Supervised", "create_trainer"]


def create_trainer(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    *,
    device: torch.device | str | None = None,
    non_blocking: bool = True,
    amp: str | torch.dtype | None = None,
    accumulation_steps: int = 1,
    loss_weight: str | Callable[[Any], Any] = "batch",
    partial_window: str = "step",
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    scheduler: Any = None,
    schedule_every: str = "step",
    prepare_batch: Callable[..., tuple[Any, Any]] = prepare_pair,
    model_transform: Callable[[Any], Any] | None = None,
    output_transform: Callable[[Any, Any, Any, torch.Tensor], Any] | None = None,
    compute_loss: Callable[[nn.Module, Any], Any] | None = None,
    capture: bool = False,
) -> Trainer:
    """Makes a trainer whose ``run(loader, max_epochs=...)`` trains the model.

    An argument that corresponds to a handler is shorthand for attaching that handler: ``clip_grad_norm=1.0`` is
    ``GradientClipping(max_norm=1.0).attach(trainer)``.

    Args:
        model: the network, on its device.
        optimizer: its optimizer, or a sequence of optimizers that step together.
        loss_fn: called as ``loss_fn(y_pred, y)``; returns a scalar. ``None`` if ``compute_loss`` is given.
        device: the device of the batches; by default that of the model's parameters.
        non_blocking: lets copies from pinned memory overlap with computation.
        amp: ``None``, ``"bf16"``, ``"fp16"`` (with a gradient scaler) or the ``torch.dtype``.
        accumulation_steps: the number of batches in one optimizer step.
        loss_weight: the weight of each batch in a window: the same for all (``"batch"``), its number of samples
            (``"samples"``), or a function of the batch as the loader returned it (its number of tokens, say).
        partial_window: what to do with an epoch's last, shorter window: ``"step"`` or ``"drop"``.
        clip_grad_norm: the maximum total 2-norm of the gradient.
        clip_grad_value: the maximum absolute value of each gradient entry.
        scheduler: any ``torch.optim.lr_scheduler``, or a sequence of them.
        schedule_every: ``"step"`` (each optimizer step) or ``"epoch"``.
        prepare_batch: called as ``prepare_batch(batch, device=..., non_blocking=...)``; returns ``(x, y)`` on the device.
        model_transform: applied to the model's output before the loss.
        output_transform: called with detached ``(x, y, y_pred, loss)``; returns ``state.output``. By default the loss.
        compute_loss: any other objective: called as ``compute_loss(model, batch)`` with the batch on the device, under
            autocast. Returns a scalar, or a mapping with ``"loss"`` whose other entries are logged by name.
        capture: runs forward, backward, clipping and optimizer step as CUDA graphs, for batches of the same shape and a loss
            whose Python code does the same for each. Adam and AdamW must be made with ``capturable=True``. No handler can
            run on ``FORWARD_COMPLETED`` and ``BACKWARD_STARTED``.

    Returns:
        The trainer.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a value is not allowed, or model, optimizer and scheduler do not belong together.
        RuntimeError: if the device does not support ``amp``.

    Example:
        >>> model = torch.nn.Linear(8, 3)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> trainer = create_trainer(model, optimizer, torch.nn.functional.cross_entropy, clip_grad_norm=1.0)
        >>> batches = [(torch.randn(4, 8), torch.randint(3, (4,)))] * 5
        >>> trainer.run(batches, max_epochs=2).optimizer_step
        10
    """
    check_every(schedule_every)
    objective: Supervised | Custom
    if compute_loss is not None:
        check_custom(compute_loss, loss_fn, prepare_batch, model_transform, output_transform)
        objective = Custom(model, compute_loss)
        phase = Phase("model", model, optimizer, objective, device=device, non_blocking=non_blocking)
        trainer = Trainer([phase])
    else:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {loss_fn!r}; pass compute_loss= for an objective without one")
        check_no_class(loss_fn, "loss_fn", "a function of (y_pred, y)")
        check_prepare(prepare_batch)
        objective = Supervised(model, loss_fn, prepare_batch, model_transform)
        phase = Phase("model", model, optimizer, objective, prepare=objective.prepare, device=device, non_blocking=non_blocking)
        objective.device, objective.non_blocking = phase.device, non_blocking
        trainer = Trainer([phase], output=None if output_transform is None else Output(output_transform))

    if not isinstance(capture, bool):
        raise TypeError(f"capture must be True or False, got {capture!r}")
    if capture:
        phase.execution = CudaGraphExecution(phase)
    attach_settings(
        trainer,
        amp=amp,
        accumulation_steps=accumulation_steps,
        loss_weight=loss_weight,
        partial_window=partial_window,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
    )
    attach_schedulers(trainer, scheduler, schedule_every)
    return trainer


class Supervised(Objective):
    """The objective ``loss_fn(model_transform(model(x)), y)``."""

    device: torch.device | None = None
    can_be_captured = True

    def __init__(self, model: nn.Module, loss_fn: Any, prepare_batch: Any, model_transform: Any) -> None:
        if model_transform is not None and not callable(model_transform):
            raise TypeError(f"model_transform must be callable, got {model_transform!r}")
        check_no_class(model_transform, "model_transform", "a function of the model's output", nn.Module)
        self.model, self.loss_fn, self.prepare_batch, self.model_transform = model, loss_fn, prepare_batch, model_transform
        self.label = f"loss_fn {name_of(loss_fn)}"

    def prepare(self, engine: Any, batch: Any) -> None:
        """Moves the batch to the device, as ``state.x`` and ``state.y``."""
        state = engine.state
        pair = self.prepare_batch(batch, device=self.device, non_blocking=self.non_blocking)
        try:
            state.x, state.y = pair
        except (TypeError, ValueError):
            raise TypeError(f"prepare_batch ({name_of(self.prepare_batch)}) must return (x, y), got {pair!r:.200}") from None

    def inputs(self, state: Any) -> list[Any]:
        """The batch's ``x``."""
        return [state.x]

    def __call__(self, engine: Any, _: Any) -> Any:
        state = engine.state
        y_pred = self.model(state.x)
        if self.model_transform is not None:
            y_pred = self.model_transform(y_pred)
        state.y_pred = y_pred
        return self.loss_fn(y_pred, state.y)


class Custom(Objective):
    """The objective ``compute_loss(model, batch)``."""

    can_be_captured = True

    def __init__(self, model: nn.Module, compute_loss: Any) -> None:
        self.model, self.loss_fn = model, compute_loss
        self.label = f"compute_loss {name_of(compute_loss)}"

    def __call__(self, engine: Any, batch: Any) -> Any:
        return self.loss_fn(self.model, batch)


class Output:
    """``state.output`` as a user's ``output_transform`` of detached tensors."""

    def __init__(self, transform: Any) -> None:
        if not callable(transform):
            raise TypeError(f"output_transform must be callable, got {transform!r}")
        self.transform = transform

    def __call__(self, engine: Any) -> Any:
        state = engine.state
        return self.transform(detach(state.x), detach(state.y), state.y_pred, state.loss)


def check_custom(compute_loss: Any, loss_fn: Any, prepare_batch: Any, model_transform: Any, output_transform: Any) -> None:
    """Raises ``ValueError`` if ``compute_loss`` is combined with arguments that it replaces."""
    if not callable(compute_loss):
        raise TypeError(f"compute_loss must be callable, got {compute_loss!r}")
    check_no_class(compute_loss, "compute_loss", "a function of (model, batch)")
    replaced = {
        "loss_fn": loss_fn is not None,
        "prepare_batch": prepare_batch is not prepare_pair,
        "model_transform": model_transform is not None,
        "output_transform": output_transform is not None,
    }
    given = [name for name, is_given in replaced.items() if is_given]
    if given:
        raise ValueError(f"compute_loss gets the model and the whole batch, so {', '.join(given)} can't be used with it")
