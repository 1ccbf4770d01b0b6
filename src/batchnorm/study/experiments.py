"""The table of experiments, in the order of the article's statements."""

from __future__ import annotations

from typing import Any

from batchnorm.study import dispute, dropout, equations, inference, noise, placement, rates, scales, shift, speed
from batchnorm.study.experiment import Experiment

EXPERIMENTS: tuple[Experiment[Any], ...] = (
    placement.EXPERIMENT,
    equations.EXPERIMENT,
    noise.EXPERIMENT,
    inference.EXPERIMENT,
    shift.EXPERIMENT,
    scales.EXPERIMENT,
    speed.EXPERIMENT,
    rates.EXPERIMENT,
    dropout.EXPERIMENT,
    dispute.EXPERIMENT,
)
