"""Two versions of this package in one run, in turn, with the answers compared, as Markdown tables.

    python benchmarks/versions.py BEFORE AFTER [--suite NAME] [--dtype NAME] [--threads N] [--seconds S] [--json FILE]

BEFORE and AFTER are folders that contain `batchnorm/`, with its `_native.so`. Each is imported by a process of its own
(`versions_worker.py`), from that folder and no other; the libraries that it needs are those of this process. Both work
on the same values. A number is the median over the turns, and a ratio the median of the turns' ratios: below 1, AFTER
is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm.bench import measure
from batchnorm.bench.suites import LAYOUTS, SHAPES, USUAL, Case
from batchnorm.errors import BatchNormError, UsageError

PHASES = ("forward", "both", "inference")
SUITES = SHAPES | {"quick": ((32, 64), (4096, 256), (5, 17, 13, 11), (8, 64, 32, 32))}
TURN = 0.02  # a process comes back from waiting: what it had in the caches may be gone, and is not to matter
WORKER = Path(__file__).with_name("versions_worker.py")


@dataclass(frozen=True)
class VersionCase(Case):
    """A case of the package's benchmark, and what else the layer does.

    Attributes:
        activation: inside the layer, or None.
        mask: whether a boolean mask chooses the positions that count.
    """

    activation: str | None = None
    mask: bool = False

    @property
    def name(self) -> str:
        """For a row of the table."""
        parts = [str(self.shape), self.layout, self.dtype, self.activation or "no activation"]
        return ", ".join(parts + ["residual"] * self.residual + ["mask"] * self.mask)


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "relu"},
    {"activation": "relu", "residual": True},
    {"mask": True},
)


def cases(suite: str, dtypes: Sequence[str]) -> list[VersionCase]:
    """Every case of a suite, or of all of them ("all")."""
    return [
        VersionCase(name, shape, layout, dtype, **variant)
        for name, shapes in SUITES.items()
        if suite in (name, "all")
        for shape in shapes
        for layout in LAYOUTS[len(shape)]
        for dtype in dtypes
        for variant in VARIANTS
    ]


class Version:
    """One version of the package in a process of its own; requests and replies are lines of JSON."""

    def __init__(self, name: str, tree: Path, threads: int) -> None:
        self.name, tree = name, tree.resolve()
        if not (tree / "batchnorm" / "__init__.py").exists():
            raise UsageError(f"got {tree} for {name}; it must be a folder that contains batchnorm/")
        self._folder = tempfile.TemporaryDirectory()
        # -S: hooks of site-packages may find an installed version of the package before any path is searched.
        command = [sys.executable, "-S", str(WORKER), str(tree), json.dumps(sys.path[1:]), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.information = self._ask(do="describe")
            if not Path(self.information["file"]).is_relative_to(tree):
                raise BatchNormError(f"got {tree} for {name}, but the process imported {self.information['file']}")
        except BatchNormError:
            self.stop()
            raise

    def _ask(self, **request: Any) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BatchNormError(f"{self.name}: the process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def load(self, case: Case) -> bool:
        """Prepare a case."""
        self._ask(do="load", case=asdict(case))
        return True

    def run(self, phase: str, count: int = 1) -> float:
        """Do the work some times; mean seconds of one."""
        seconds: float = self._ask(do="run", phase=phase, count=count)
        return seconds

    def answer(self) -> list[Tensor]:
        """The output y and the gradients dx, dweight and dbias, as float32."""
        path = Path(self._folder.name) / "answer.pt"
        self._ask(do="answer", file=str(path))
        tensors: list[Tensor] = torch.load(path)
        return tensors

    def close(self) -> None:
        """Nothing to do: the next case takes this one's place."""

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # where the process has ended by itself
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._folder.cleanup()


@contextmanager
def started(trees: dict[str, Path], threads: int) -> Iterator[list[Version]]:
    """The versions, until the end of the block."""
    with ExitStack() as exits:
        versions = []
        for name, tree in trees.items():
            versions.append(version := Version(name, tree, threads))
            exits.callback(version.stop)
        yield versions


@dataclass(frozen=True)
class Row:
    """A case and a phase: median seconds of both versions, and the median ratio."""

    case: VersionCase
    phase: str
    before: float
    after: float
    ratio: float


def compared(versions: Sequence[Version], case: VersionCase, seconds: float) -> list[Row]:
    """A row for each phase.

    Raises:
        AnswersDifferError: the versions do not compute the same.
    """
    for version in versions:
        version.load(case)
    measure.compare(case, versions)
    rows = []
    for phase in PHASES:
        works: dict[str, Callable[[int], float]] = {v.name: partial(v.run, phase) for v in versions}
        for work in works.values():
            work(3)
        before, after = measure.take_turns(works, seconds=seconds, turn=min(TURN, seconds)).values()
        ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
        rows.append(Row(case, phase, statistics.median(before), statistics.median(after), ratio))
    return rows


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric mean and worst of each phase."""
    sentences = []
    for phase in PHASES:
        of_phase = [row for row in rows if row.phase == phase]
        worst = max(of_phase, key=lambda row: row.ratio)
        mean = measure.geometric_mean([row.ratio for row in of_phase])
        sentences.append(
            f"- {phase}: geometric mean {mean:.3f} over {len(of_phase)} cases, worst {worst.ratio:.2f} at "
            f"{worst.case.name}"
        )
    return sentences


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="versions.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("before", type=Path, help="a folder that contains batchnorm/")
    parser.add_argument("after", type=Path, help="another")
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="quick")
    parser.add_argument("--dtype", choices=USUAL["cpu"], help="both by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 on a machine that is busy")
    parser.add_argument("--seconds", type=float, default=0.5, help="for a case and a phase")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with started({"before": options.before, "after": options.after}, options.threads) as versions:
        for version in versions:
            print(f"- {version.name}: {version.information['file']}, {version.information['kernels']}")
        print("\n| case | phase | before, ms | after, ms | after / before |\n|---|---|---|---|---|")
        for case in cases(options.suite, [options.dtype] if options.dtype else USUAL["cpu"]):
            for row in compared(versions, case, options.seconds):
                rows.append(row)
                times = f"{1e3 * row.before:.4f} | {1e3 * row.after:.4f} | {row.ratio:.2f}"
                print(f"| {case.name} | {row.phase} | {times} |", flush=True)
    print("\n" + "\n".join(summary(rows)))
    if options.json is not None:
        document = measure.run_information() | {
            "threads": options.threads,
            "before": versions[0].information,
            "after": versions[1].information,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BatchNormError as error:
        raise SystemExit(f"versions.py: {error}") from error
