"""Batch normalization for PyTorch that you can trust, at the speed of memory."""

from batchnorm import errors, functional
from batchnorm.deferral import Pending, deferred
from batchnorm.diagnosis.check import check
from batchnorm.diagnosis.monitor import Monitor
from batchnorm.errors import BatchNormError
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.memory.recompute import recompute
from batchnorm.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.moments import Moments
from batchnorm.ops import kernels
from batchnorm.population.recalibrate import recalibrate
from batchnorm.population.result import Recalibration
from batchnorm.renorm import Renorm
from batchnorm.surgery.biases import remove_dead_biases
from batchnorm.surgery.convert import convert
from batchnorm.surgery.fold import fold
from batchnorm.surgery.freeze import freeze, unfreeze
from batchnorm.surgery.fuse import fuse
from batchnorm.surgery.revert import revert

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Monitor",
    "Pending",
    "Recalibration",
    "Renorm",
    "check",
    "convert",
    "deferred",
    "errors",
    "fold",
    "freeze",
    "functional",
    "fuse",
    "kernels",
    "recalibrate",
    "recompute",
    "remove_dead_biases",
    "revert",
    "unfreeze",
]
