"""Batch normalization for PyTorch that you can trust, at the speed of memory."""

from batchnorm import errors, functional
from batchnorm.choosing import domain
from batchnorm.deferral import Pending, deferred
from batchnorm.diagnosis.check import check
from batchnorm.diagnosis.monitor import Monitor
from batchnorm.errors import BatchNormError
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.memory.recompute import recompute
from batchnorm.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.moments import Moments
from batchnorm.ops import kernels
from batchnorm.population.adapt import Adaptation, adapt
from batchnorm.population.distance import DomainDistance, domain_distance
from batchnorm.population.merged import PooledStatistics, pool_statistics
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
    "Adaptation",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "DomainDistance",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Monitor",
    "Pending",
    "PooledStatistics",
    "Recalibration",
    "Renorm",
    "adapt",
    "check",
    "convert",
    "deferred",
    "domain",
    "domain_distance",
    "errors",
    "fold",
    "freeze",
    "functional",
    "fuse",
    "kernels",
    "pool_statistics",
    "recalibrate",
    "recompute",
    "remove_dead_biases",
    "revert",
    "unfreeze",
]
