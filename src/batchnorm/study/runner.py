"""A run through the table of experiments: what `batchnorm study` does."""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from batchnorm import extras
from batchnorm.errors import UsageError
from batchnorm.files import write_text
from batchnorm.messages import described
from batchnorm.report import charts, text
from batchnorm.report.document import Document
from batchnorm.report.page import page
from batchnorm.study import dataset
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.experiments import EXPERIMENTS
from batchnorm.study.grid import Args, Results
from batchnorm.study.networks import LAYERS, OURS
from batchnorm.study.result_cache import ResultCache, exclusive, software
from batchnorm.study.time_left import TimeLeft
from batchnorm.study.verdict import Finding, Postponed
from batchnorm.study.workers import compute, cores

SCHEMA = 3
TITLE = "What batch normalization does"
TASKS, FIGURES = "tasks", "figures"  # folders in `out`


@dataclass(frozen=True)
class Study:
    """What a run leaves.

    Attributes:
        findings: a verdict on every claim, in order.
        page: where the report is.
    """

    findings: tuple[Finding | Postponed, ...]
    page: Path


@dataclass(frozen=True)
class _Task:
    """One task of an experiment."""

    run: Callable[..., dict[str, Any]]
    plan: Any
    args: Args
    seconds: float  # about how many it takes on one core


def _done(setting: Setting, task: _Task) -> dict[str, Any]:
    return task.run(setting, task.plan, *task.args)


def study(
    out: Path,
    *,
    console: Console,
    quick: bool = False,
    data: str | None = None,
    layers: str = OURS.name,
    experiments: Sequence[Experiment[Any]] = EXPERIMENTS,
    processes: int | None = None,
) -> Study:
    """Do the tasks of all experiments, and write results.json, report.html and the figures into `out`.

    Each task's result is stored in `out` as soon as it is there. A run that was interrupted, even killed, goes on where
    it was when it is started again, and ends with the same results.json, byte for byte.

    Args:
        out: a directory, made if it is missing.
        console: where the progress is shown.
        quick: the small plans.
        data: as `dataset.load` takes it; None for the digits.
        layers: a name of `networks.LAYERS`.
        experiments: which.
        processes: how many to compute with; None for as many as there are cores. The results do not depend on it.

    Raises:
        UsageError: a package of the extra is missing, the data are not as they must be, or `out` cannot be written to.
    """
    extras.require("study", "the study")
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # better to fail now than after the work
    left = TimeLeft()
    with text.time_left(console, "study", left.now):
        started = time.time()
        setting = Setting(dataset.digits() if data is None else dataset.load(data), LAYERS[layers])
        plans = [experiment.quick if quick else experiment.full for experiment in experiments]
        conclusions, took = _examine(out, setting, experiments, plans, processes or cores(), left)
        facts = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "took": f"{time.time() - started:.0f} s for {took}; the rest was stored",
            "data": f"{setting.data.name} ({setting.data.digest})",
            "layers": layers,
            **software(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": str(os.cpu_count() or 1),
        }
        sections = [
            experiment.section(conclusion) for experiment, conclusion in zip(experiments, conclusions, strict=True)
        ]
        command = _command(out, quick, data, layers)
        document = Document(TITLE, _introduction(setting), sections, command, list(facts.items()))
        findings = [
            conclusion.findings if conclusion is not None else experiment.postponed()
            for experiment, conclusion in zip(experiments, conclusions, strict=True)
        ]
        results = _results(experiments, plans, conclusions, findings, setting, quick)
        figures = {
            f"{section.key}-{i}.svg": charts.file(chart, f"{section.key}-{i}")
            for section in sections
            for i, chart in enumerate(section.charts, 1)
        }
        html = page(document)
        with _writing(out), exclusive(out):
            (out / FIGURES).mkdir(exist_ok=True)
            for name, drawing in figures.items():
                write_text(out / FIGURES / name, drawing)
            write_text(out / "results.json", json.dumps(results, allow_nan=False, indent=1) + "\n")
            write_text(out / "report.html", html)
    return Study(tuple(finding for of_row in findings for finding in of_row), out / "report.html")


def _examine(
    out: Path,
    setting: Setting,
    experiments: Sequence[Experiment[Any]],
    plans: Sequence[Any],
    processes: int,
    left: TimeLeft,
) -> tuple[list[Conclusion | None], str]:
    """What follows from all tasks, None where there is no plan; and how many tasks were done now."""
    rows = [(experiment, plan) for experiment, plan in zip(experiments, plans, strict=True) if plan is not None]
    with _writing(out):
        caches = {experiment.name: ResultCache(out / TASKS, experiment, plan, setting) for experiment, plan in rows}
    tasks = [
        (caches[experiment.name], _Task(experiment.run, plan, args, experiment.seconds(plan)))
        for experiment, plan in rows
        for args in experiment.grid(plan).tasks()
    ]
    missing = [(cache, task) for cache, task in tasks if cache.get(task.args) is None]
    # In a mixed order, so that the time left can be told from the first ones. Results do not depend on the order.
    random.Random(0).shuffle(missing)
    left.begin([task.seconds for _, task in missing], processes)
    work = partial(_done, setting)  # sent to each worker once, with the data
    for position, result in compute(work, [task for _, task in missing], processes):
        cache, task = missing[position]
        _put(cache, task, result, out)
        left.advance(task.seconds)

    # Read back, new ones too, so that a number is the same whether it is of this run or of one before.
    def conclusion(experiment: Experiment[Any], plan: object) -> Conclusion:
        cache = caches[experiment.name]
        stored = Results({args: _stored(cache, args) for args in experiment.grid(plan).tasks()})
        return experiment.conclude(setting, plan, stored)

    return [
        conclusion(experiment, plan) if plan is not None else None
        for experiment, plan in zip(experiments, plans, strict=True)
    ], f"{len(missing)} of {len(tasks)} tasks"


def _put(cache: ResultCache, task: _Task, result: dict[str, Any], out: Path) -> None:
    try:
        with _writing(out):
            cache.put(task.args, result)
    except ValueError as error:
        raise UsageError(
            f"the task {task.args} of {task.run.__module__} found numbers that are inf or NaN; such data cannot be "
            f"examined. Look for values that are much larger than the others, and for samples that are all alike"
        ) from error


def _stored(cache: ResultCache, args: Args) -> dict[str, Any]:
    result = cache.get(args)
    if result is None:
        raise UsageError(f"the result of {args} is gone; something else removes files of the study's --out")
    return result


def _results(
    experiments: Sequence[Experiment[Any]],
    plans: Sequence[Any],
    conclusions: Sequence[Conclusion | None],
    findings: Sequence[Sequence[Finding | Postponed]],
    setting: Setting,
    quick: bool,
) -> dict[str, Any]:
    """results.json: nothing in it changes from run to run."""
    data = setting.data
    found: dict[str, dict[str, Any]] = {
        experiment.name: {"findings": [finding.record() for finding in of_row]}
        for experiment, of_row in zip(experiments, findings, strict=True)
    }
    for experiment, plan, conclusion in zip(experiments, plans, conclusions, strict=True):
        if conclusion is not None:
            found[experiment.name] |= {"plan": asdict(plan), "numbers": conclusion.numbers}
    return {
        "schema": SCHEMA,
        "quick": quick,
        "layers": setting.layers.name,
        "data": {
            "name": data.name,
            "digest": data.digest,
            "shape": data.shape,
            "classes": data.classes,
            "train": len(data.train.labels),
            "test": len(data.test.labels),
        },
        "software": software(),
        "experiments": found,
    }


def _introduction(setting: Setting) -> str:
    data = setting.data
    return (
        f"The statements of an article on batch normalization, examined on {data.name}: {len(data.train.labels):,} "
        f"samples to train and {len(data.test.labels):,} to test, {data.classes} classes. Each statement became an "
        "experiment with a criterion that was fixed before its numbers were known; the verdicts below are computed."
    )


def _command(out: Path, quick: bool, data: str | None, layers: str) -> str:
    parts = ["batchnorm", "study", *(["--quick"] if quick else []), *(["--data", data] if data is not None else [])]
    return shlex.join([*parts, *(["--layers", layers] if layers != OURS.name else []), "--out", str(out)])


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to {out}: {error.strerror or described(error)}. Choose another --out"
        ) from error
