"""What turns a batch into an update: the step, the factories, and what they are made of."""

from camshaft.checkpoints.weights import load_weights, save_weights
from camshaft.data.seeding import SeededDataset, seed_everything, worker_init_fn
from camshaft.engines.evaluator import create_evaluator
from camshaft.engines.gan import create_gan_trainer
from camshaft.engines.phase import Phase
from camshaft.engines.supervised import create_trainer
from camshaft.engines.trainer import Trainer
from camshaft.gan.penalties import DRAGAN, R1, R2, GradientPenalty, gradient_penalty

__all__ = [
    "DRAGAN",
    "GradientPenalty",
    "Phase",
    "R1",
    "R2",
    "SeededDataset",
    "Trainer",
    "create_evaluator",
    "create_gan_trainer",
    "create_trainer",
    "gradient_penalty",
    "load_weights",
    "save_weights",
    "seed_everything",
    "worker_init_fn",
]
