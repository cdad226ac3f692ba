"""Handlers: one file each, named after its class. A new one needs its file and one line here."""

from typing import TYPE_CHECKING

from camshaft.handler import Handler as Handler
from camshaft.handler import on as on
from camshaft.handlers.checkpoint_rotation import CheckpointRotation as CheckpointRotation
from camshaft.handlers.early_stopping import EarlyStopping as EarlyStopping
from camshaft.handlers.empty_cache import EmptyCache as EmptyCache
from camshaft.handlers.evaluation import Evaluation as Evaluation
from camshaft.handlers.exponential_moving_average import ExponentialMovingAverage as ExponentialMovingAverage
from camshaft.handlers.freeze_parameters import FreezeParameters as FreezeParameters
from camshaft.handlers.gradient_accumulation import GradientAccumulation as GradientAccumulation
from camshaft.handlers.gradient_clipping import GradientClipping as GradientClipping
from camshaft.handlers.keras_style import KerasStyle as KerasStyle
from camshaft.handlers.lr_history import LRHistory as LRHistory
from camshaft.handlers.lr_scheduling import LRScheduling as LRScheduling
from camshaft.handlers.mixed_precision import MixedPrecision as MixedPrecision
from camshaft.handlers.non_finite_guard import NonFiniteGuard as NonFiniteGuard
from camshaft.handlers.progress import Progress as Progress
from camshaft.handlers.stop_on_signal import StopOnSignal as StopOnSignal
from camshaft.handlers.tensorboard import TensorBoard as TensorBoard
from camshaft.handlers.time_limit import TimeLimit as TimeLimit

if not TYPE_CHECKING:  # a type checker takes the names from the imports above
    __all__ = sorted(name for name, value in globals().items() if name == "on" or isinstance(value, type))
