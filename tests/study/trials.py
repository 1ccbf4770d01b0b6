"""Experiments of a moment, for the tests of what runs experiments; and the real ones' smallest plans."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Measured
from batchnorm.study.verdict import Claim, Margin, Quantity

CLAIM = Claim("positive", "M1", "It is positive", Quantity("mean", form=".2f"), Margin("the mean", 0.0))


@dataclass(frozen=True)
class Plan:
    """How many numbers are drawn; where to say that a task was done, and what to do in task number `trouble`."""

    count: int = 8
    said: str = ""
    trouble: str = ""
    at: int = 5


def run(setting: Setting, plan: Plan, what: str, number: int) -> dict[str, Any]:
    if plan.said:
        with Path(plan.said).open("a") as file:
            file.write(f"{number} {os.getpid()} {torch.get_num_threads()}\n")
    if number == plan.at and plan.trouble == "raise":
        raise ArithmeticError(f"trouble with {what} {number}")
    if number == plan.at and plan.trouble == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan.trouble == "slow":
        time.sleep(0.2)
    if number == plan.at and plan.trouble == "nan":
        return {"value": math.nan}
    mean = setting.data.train.inputs.double().mean().item()
    return {"value": mean + 0.1 * number, "list": [number, None]}


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    values = [result["value"] for result in results.values()]
    mean = Measured.mean(values)
    summary = [f"The mean is {mean.interval.estimate:.3f} with {setting.layers.name}."]
    return Conclusion({"values": values}, [CLAIM.judge(mean, {"": values})], summary)


def grid(plan: Plan) -> Grid:
    return Grid(plan.count, what=["draw"])


def trial(name: str = "trial", **options: object) -> Experiment[Plan]:
    plan = Plan(**options)  # type: ignore[arg-type]
    return Experiment(name, "Is it positive?", (CLAIM,), plan, plan, grid, run, conclude, lambda _: 0.1)
