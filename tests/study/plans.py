"""The smallest plans of the experiments, and how tests carry them out."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any, NamedTuple

from torch import Tensor

from batchnorm.study import dispute, dropout, equations, inference, noise, placement, rates, scales, shift, speed
from batchnorm.study.dataset import Part
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.grid import Results
from batchnorm.study.training import one_thread

TINY: dict[str, Any] = {
    "placement": placement.Plan(seeds=2, steps=3, rates=(0.1,), hidden=(8,), width=2, blocks=1),
    "equations": equations.Plan(seeds=2, features=8, shown=3),
    "noise": noise.Plan(seeds=6, draws=20, features=8, sizes=(2, 8, 32), large=64, rounds=4),
    "inference": inference.Plan(seeds=2, steps=20, hidden=(16, 16), width=3, shown=24),
    "shift": shift.Plan(seeds=2, steps=12, every=6, hidden=(16, 16, 16), watched=64),
    "scales": scales.Plan(seeds=2, rates=(0.03, 0.3), steps=20, hidden=(16,)),
    "speed": speed.Plan(seeds=2, steps=4, evaluate_every=2, rates=(0.1, 0.5), hidden=(8,)),
    "rates": rates.Plan(seeds=2, steps=3, rates=(0.01, 0.1, 1.0), hidden=(8,)),
    "dropout": dropout.Plan(seeds=2, samples=64, steps=3, rates=(0.1,), hidden=(8,)),
    "dispute": dispute.Plan(seeds=2, steps=12, every=6, hidden=(16, 16, 16), watched=64),
}


class Start(NamedTuple):
    """What a training starts from."""

    weights: list[Tensor]
    samples: Part
    order: Tensor
    dropped: list[float]
    options: dict[str, float]


def carried_out(experiment: Experiment[Any], setting: Setting, plan: Any) -> Conclusion:
    """All tasks one after the other, their results through JSON as when they are stored, and the conclusion."""
    with one_thread():
        results = {
            args: json.loads(json.dumps(experiment.run(setting, plan, *args), allow_nan=False))
            for args in experiment.grid(plan).tasks()
        }
    return experiment.conclude(setting, plan, Results(results))


def runs_as_printed(code: str) -> str:
    """What a section's snippet prints when it is run by itself."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "the snippet", "exec"), {})
    return printed.getvalue()
