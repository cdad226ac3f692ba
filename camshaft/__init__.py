"""A training engine on pytorch-ignite: one training step is a cycle of named moments, and handlers open at theirs.

Example:
    >>> import torch
    >>> from camshaft import StepEvents, create_trainer
    >>> model = torch.nn.Linear(8, 3)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> trainer = create_trainer(model, optimizer, torch.nn.functional.cross_entropy, clip_grad_norm=1.0)
    >>> @trainer.on(StepEvents.GRADIENTS_CLIPPED(every=100))
    ... def look(engine):
    ...     print(engine.state.optimizer_step, engine.state.grad_norm)
"""

from camshaft.data.prefetch import Prefetch
from camshaft.engines import (
    DRAGAN,
    R1,
    R2,
    GradientPenalty,
    Phase,
    SeededDataset,
    Trainer,
    create_evaluator,
    create_gan_trainer,
    create_trainer,
    gradient_penalty,
    load_weights,
    save_weights,
    seed_everything,
    worker_init_fn,
)
from camshaft.events import Events, Priority, StepEvents
from camshaft.handler import Handler, on
from camshaft.handlers import (
    CheckpointRotation,
    EarlyStopping,
    EmptyCache,
    Evaluation,
    ExponentialMovingAverage,
    FreezeParameters,
    GradientAccumulation,
    GradientClipping,
    KerasStyle,
    LRHistory,
    LRScheduling,
    MixedPrecision,
    NonFiniteGuard,
    Progress,
    StopOnSignal,
    TensorBoard,
    TimeLimit,
)
from camshaft.models import ParameterCount, count_parameters, freeze, unfreeze

__version__ = "0.1.0"

__all__ = [
    "CheckpointRotation",
    "DRAGAN",
    "EarlyStopping",
    "EmptyCache",
    "Evaluation",
    "Events",
    "ExponentialMovingAverage",
    "FreezeParameters",
    "GradientAccumulation",
    "GradientClipping",
    "GradientPenalty",
    "Handler",
    "KerasStyle",
    "LRHistory",
    "LRScheduling",
    "MixedPrecision",
    "NonFiniteGuard",
    "ParameterCount",
    "Phase",
    "Prefetch",
    "Priority",
    "Progress",
    "R1",
    "R2",
    "SeededDataset",
    "StepEvents",
    "StopOnSignal",
    "TensorBoard",
    "TimeLimit",
    "Trainer",
    "count_parameters",
    "create_evaluator",
    "create_gan_trainer",
    "create_trainer",
    "freeze",
    "gradient_penalty",
    "load_weights",
    "on",
    "save_weights",
    "seed_everything",
    "unfreeze",
    "worker_init_fn",
]
