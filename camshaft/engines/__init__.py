"""What turns a batch into an update: the step, the factories, and what they are made of."""

from camshaft.engines.evaluator import create_evaluator
from camshaft.engines.gan import create_gan_trainer
from camshaft.engines.penalties import DRAGAN, R1, R2, GradientPenalty, gradient_penalty
from camshaft.engines.phase import Phase
from camshaft.engines.seeding import SeededDataset, seed_everything, worker_init_fn
from camshaft.engines.supervised import create_trainer
from camshaft.engines.trainer import Trainer
from camshaft.engines.weights import load_weights, save_weights

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
