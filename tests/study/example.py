"""A whole experiment, as somebody would add it: does a plain perceptron learn more in more steps?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from batchnorm.report.document import Chart, Table
from batchnorm.study import training
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import in_points, mean_curve, mean_percent, points
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Paired
from batchnorm.study.verdict import Claim, Margin, Quantity

LONGER = Claim(
    "longer",
    "M1",
    "Four times the steps give a better accuracy",
    Quantity("test accuracy", "%", ".1f", 100),
    Margin("test accuracy after the longer training minus that after the shorter one", 0.0, "percentage points"),
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int = 6
    steps: tuple[int, ...] = (20, 80)


def run(setting: Setting, plan: Plan, steps: int, seed: int) -> dict[str, Any]:
    """Train one network; the test accuracy that it settles at."""
    generator = torch.Generator().manual_seed(seed)
    model = setting.perceptron((16,), "none", generator)
    descent = training.descend(model, setting.data.train, learning_rate=0.1, batch_size=32, generator=generator)
    (accuracy,) = training.settle(model, descent, steps, [setting.data.test])
    return {"accuracy": accuracy}


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Compare the two lengths, seed by seed."""
    accuracy = {steps: results.column("accuracy", steps) for steps in plan.steps}
    shorter, longer = accuracy.values()
    gain = Paired(longer, shorter).difference()
    curve = mean_curve("plain", plan.steps, [shorter, longer], times=100)
    return Conclusion(
        numbers={"runs": results.records("steps", "seed")},
        findings=[LONGER.judge(gain.map(in_points), {"longer": longer, "shorter": shorter})],
        summary=[f"The longer training changed the test accuracy by {points(gain.interval)}."],
        tables=[Table("Accuracy", ["steps", "%"], [[str(n), mean_percent(accuracy[n])] for n in plan.steps])],
        charts=[Chart("Accuracy", "More is better.", "steps", "%", [curve])],
        notes=["Plain gradient descent."],
    )


EXPERIMENT = Experiment(
    name="longer",
    title="Does longer training help?",
    claims=(LONGER,),
    full=Plan(seeds=10),
    quick=Plan(),
    grid=lambda plan: Grid(plan.seeds, steps=plan.steps),
    run=run,
    conclude=conclude,
    seconds=lambda plan: sum(plan.steps) / 2000,
    code="print('longer')\n",
)
