"""What opens at an event: one file per handler, named after it."""

from camshaft.handler import Handler, on
from camshaft.handlers.checkpoint_rotation import CheckpointRotation
from camshaft.handlers.early_stopping import EarlyStopping
from camshaft.handlers.empty_cache import EmptyCache
from camshaft.handlers.evaluation import Evaluation
from camshaft.handlers.exponential_moving_average import ExponentialMovingAverage
from camshaft.handlers.freeze_parameters import FreezeParameters
from camshaft.handlers.gradient_accumulation import GradientAccumulation
from camshaft.handlers.gradient_clipping import GradientClipping
from camshaft.handlers.keras_style import KerasStyle
from camshaft.handlers.lr_history import LRHistory
from camshaft.handlers.lr_scheduling import LRScheduling
from camshaft.handlers.mixed_precision import MixedPrecision
from camshaft.handlers.non_finite_guard import NonFiniteGuard
from camshaft.handlers.progress import Progress
from camshaft.handlers.stop_on_signal import StopOnSignal
from camshaft.handlers.tensorboard import TensorBoard
from camshaft.handlers.time_limit import TimeLimit

__all__ = [
    "CheckpointRotation",
    "EarlyStopping",
    "EmptyCache",
    "Evaluation",
    "ExponentialMovingAverage",
    "FreezeParameters",
    "GradientAccumulation",
    "GradientClipping",
    "Handler",
    "KerasStyle",
    "LRHistory",
    "LRScheduling",
    "MixedPrecision",
    "NonFiniteGuard",
    "Progress",
    "StopOnSignal",
    "TensorBoard",
    "TimeLimit",
    "on",
]
