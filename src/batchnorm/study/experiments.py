"""The table of experiments, in the order of the article's statements."""

from __future__ import annotations

from typing import Any

from batchnorm.study import rates, speed
from batchnorm.study.experiment import Experiment

EXPERIMENTS: tuple[Experiment[Any], ...] = (speed.EXPERIMENT, rates.EXPERIMENT)
