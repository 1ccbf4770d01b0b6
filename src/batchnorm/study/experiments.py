"""The table of experiments, and the run through it that `batchnorm study` is."""

from __future__ import annotations

import json
import os
import platform
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console

import batchnorm
from batchnorm import extras
from batchnorm.errors import UsageError
from batchnorm.report import text
from batchnorm.report.document import Document, Section
from batchnorm.report.page import page
from batchnorm.study import speed
from batchnorm.study.training import one_thread

SCHEMA = 1


class _Plan(Protocol):
    @property
    def work(self) -> int: ...


P = TypeVar("P", bound=_Plan)
N = TypeVar("N")


@dataclass(frozen=True)
class Experiment(Generic[P, N]):
    """One row of the table.

    Attributes:
        name: its key in results.json, and the label of its progress bar.
        full: the plan of a whole run.
        quick: the plan of `--quick`.
        run: does what a plan says, calls back with the work just done, and returns a dataclass of numbers.
        section: says what the numbers mean.
    """

    name: str
    full: P
    quick: P
    run: Callable[[P, Callable[[int], None]], N]
    section: Callable[[N], Section]


EXPERIMENTS: tuple[Experiment[Any, Any], ...] = (
    Experiment("speed", speed.Plan(seeds=10), speed.Plan(seeds=3), speed.run, speed.section),
)


@dataclass(frozen=True)
class Study:
    """What a run leaves: the sections to show, and where the page is."""

    sections: tuple[Section, ...]
    page: Path


def study(
    out: Path, *, quick: bool, console: Console, experiments: Sequence[Experiment[Any, Any]] = EXPERIMENTS
) -> Study:
    """Run the experiments, and write `results.json` and `report.html` into `out`, which is made where it is not there.

    Args:
        out: a directory.
        quick: fewer seeds.
        console: where the progress is shown.
        experiments: which.

    Raises:
        UsageError: a package of the extra is missing, or `out` cannot be written to.
    """
    extras.require("study", "the study")
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # better to fail now than after the work
    started = time.time()
    numbers: dict[str, object] = {}
    sections: list[Section] = []
    with one_thread():
        for experiment in experiments:
            plan = experiment.quick if quick else experiment.full
            with text.progress(console, experiment.name, plan.work) as advance:
                result = experiment.run(plan, advance)
            numbers[experiment.name] = asdict(result)
            sections.append(experiment.section(result))
    command = shlex.join(["batchnorm", "study", *(["--quick"] if quick else []), "--out", str(out)])
    environment = _environment(started)
    results = {
        "schema": SCHEMA,
        "quick": quick,
        "experiments": numbers,
        "environment": {"command": command, **environment},
    }
    title = "What batch normalization does to training"
    introduction = "Pairs of networks, with and without it, trained on handwritten digits from the same weights."
    document = Document(
        title, introduction, sections, command, [(name, str(value)) for name, value in environment.items()]
    )
    files = {"results.json": json.dumps(results, allow_nan=False) + "\n", "report.html": page(document)}
    with _writing(out):
        for name, content in files.items():
            (out / name).write_text(content, encoding="utf-8")
    return Study(tuple(sections), out / "report.html")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror or error}. Choose another --out") from error


def _environment(started: float) -> dict[str, str | int | float]:
    """What differs from run to run and from machine to machine, apart from the numbers."""
    kernels = {(row.device, row.dtype): row.implementation for row in batchnorm.kernels()}
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "batchnorm": batchnorm.__version__,
        "kernels": kernels["cpu", "float32"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count() or 1,
    }
