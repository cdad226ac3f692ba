"""A training engine on pytorch-ignite: events inside the training step, and handlers that run on them.

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

from types import ModuleType
from typing import TYPE_CHECKING

from camshaft.checkpoints.files import CheckpointError as CheckpointError
from camshaft.checkpoints.weights import load_weights as load_weights
from camshaft.checkpoints.weights import save_weights as save_weights
from camshaft.data.prefetch import Prefetch as Prefetch
from camshaft.data.seeding import SeededDataset as SeededDataset
from camshaft.data.seeding import seed_everything as seed_everything
from camshaft.data.seeding import worker_init_fn as worker_init_fn
from camshaft.engines import Phase as Phase
from camshaft.engines import Trainer as Trainer
from camshaft.engines import create_evaluator as create_evaluator
from camshaft.engines import create_gan_trainer as create_gan_trainer
from camshaft.engines import create_trainer as create_trainer
from camshaft.events import Events as Events
from camshaft.events import Priority as Priority
from camshaft.events import StepEvents as StepEvents
from camshaft.gan.penalties import DRAGAN as DRAGAN
from camshaft.gan.penalties import R1 as R1
from camshaft.gan.penalties import R2 as R2
from camshaft.gan.penalties import GradientPenalty as GradientPenalty
from camshaft.gan.penalties import gradient_penalty as gradient_penalty
from camshaft.handlers import *  # noqa: F403  (every handler, as camshaft.handlers lists them)
from camshaft.models import ParameterCount as ParameterCount
from camshaft.models import count_parameters as count_parameters
from camshaft.models import freeze as freeze
from camshaft.models import unfreeze as unfreeze

__version__ = "0.1.0"

if not TYPE_CHECKING:  # a type checker takes the names from the imports above
    __all__ = sorted(
        name
        for name, value in globals().items()
        if name[0] != "_" and name not in ("ModuleType", "TYPE_CHECKING") and not isinstance(value, ModuleType)
    )
