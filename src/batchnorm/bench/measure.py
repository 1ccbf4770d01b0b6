"""The run: load a case everywhere, compare the answers, time in turn, take medians."""

from __future__ import annotations

import ctypes
import datetime
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import batchnorm
from batchnorm.bench.contenders import PHASES, Contender, Peer, TorchModule, ours, torch_compile, torch_nn
from batchnorm.bench.suites import Case
from batchnorm.errors import BatchNormError
from batchnorm.files import write_text

# A case is measured for about this many seconds, in at least and at most so many turns.
SECONDS, FEWEST, MOST = 1.5, 7, 301
# Seconds of a contender's turn. Short work is repeated in it: its code is then in the cache, as in a training loop.
TURN = 2e-3
# The share of values whose ReLU may fall on either side of 0 in another rounding (torch.nn rounds to the dtype before a
# residual is added: 4e-4 in bfloat16); and how far the others may be off.
KINKS = 1e-3
TOLERANCE = {"float32": 2e-3, "bfloat16": 6e-2, "float16": 1e-2}
ANSWERS = ("y", "dx", "dweight", "dbias", "dresidual")


class AnswersDifferError(BatchNormError):
    """Contenders computed different answers, so their times cannot be compared."""


@dataclass(frozen=True)
class Row:
    """One case, one phase.

    Attributes:
        suite: the case's suite.
        shape: the case's shape.
        layout: the case's layout.
        dtype: the case's dtype.
        phase: one of `PHASES`.
        seconds: of each contender, the median; ours under "ours", the floor under "floor".
        peak_bytes: of the contenders in this process, the most memory that it had beyond what it had before; None where
            the system does not tell.
        residual: whether the case has one.
        copy_share: on a GPU, the bytes that our kernels move, over our time, over those that a copy moves in a second.
    """

    suite: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    phase: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int | None]
    residual: bool = False
    copy_share: float | None = None

    def ratio(self, contender: str) -> float | None:
        """The contender's time over ours: above 1, ours is faster."""
        return self.seconds[contender] / self.seconds["ours"] if contender in self.seconds else None


def run(
    cases: Sequence[Case], *, peers: Path | None, compile: bool, warm: bool, advance: Callable[[Row], None]
) -> list[Row]:
    """Measure.

    Args:
        cases: what to measure.
        peers: the folder with the peers' environments, or None to leave them out.
        compile: whether torch.compile takes part.
        warm: keep freed memory in the process, so that outputs lie in memory that was used before. For the rest of
            this process.
        advance: called with each row as soon as it is measured.

    Raises:
        AnswersDifferError: a contender computes another answer than ours.
        UsageError: a peer's environment is missing.
    """
    if warm:
        keep_freed_memory()
    contenders: list[Contender] = [TorchModule("ours", ours), TorchModule("torch", torch_nn)]
    contenders += [TorchModule("compile", torch_compile)] if compile else []
    started = [Peer(name, peers) for name in ("jax", "tensorflow")] if peers is not None else []
    rows = []
    try:
        for case in cases:
            taking_part = [contender for contender in (*contenders, *started) if contender.load(case)]
            compare(case, taking_part)
            for phase in PHASES:
                row = measure(case, phase, taking_part)
                rows.append(row)
                advance(row)
            for contender in taking_part:
                contender.close()
    finally:
        for peer in started:
            peer.stop()
    return rows


def measure(case: Case, phase: str, contenders: Sequence[Contender]) -> Row:
    """One row: every contender and the floor in turn."""
    works: dict[str, Callable[[], float | None]] = {c.name: partial(c.run, phase) for c in contenders}
    works["floor"] = floor(case, phase)
    peaks = {name: peak(work) if name in ("ours", "torch", "compile") else None for name, work in works.items()}
    able = {name: partial(_repeated, work) for name, work in works.items() if work() is not None}
    times = take_turns(able, seconds=SECONDS, turn=TURN)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Row(case.suite, case.shape, case.layout, case.dtype, phase, medians, peaks, case.residual)


def _repeated(work: Callable[[], float | None], count: int) -> float:
    return statistics.fmean(work() or 0.0 for _ in range(count))


def take_turns(works: Mapping[str, Callable[[int], float]], *, seconds: float, turn: float) -> dict[str, list[float]]:
    """Time several works in turn, so that what else the machine does falls on all of them.

    Args:
        works: from a number of repetitions to the mean seconds of one.
        seconds: about how long all of it may take.
        turn: seconds to fill with repetitions in one turn.

    Returns:
        The mean of each turn, by work.
    """
    first = {name: work(1) for name, work in works.items()}
    repetitions = {name: min(MOST, max(1, int(turn / once))) for name, once in first.items()}
    total = sum(once * repetitions[name] for name, once in first.items())
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(min(MOST, max(FEWEST, int(seconds / total)))):
        for name, work in works.items():
            times[name].append(work(repetitions[name]))
    return times


def floor(case: Case, phase: str) -> Callable[[], float]:
    """The same bytes moved by the fastest copy or addition, into new tensors, as the contenders'.

    Forward reads x and writes y; backward reads x and dy and writes dx.
    """
    x, dy, _, _ = case.tensors()
    copies, additions = {"forward": (1, 0), "inference": (1, 0), "backward": (0, 1), "both": (1, 1)}[phase]

    def move() -> float:
        start = time.perf_counter()
        kept = [torch.empty_like(x).copy_(x) for _ in range(copies)]
        kept += [torch.add(x, dy) for _ in range(additions)]
        seconds = time.perf_counter() - start
        del kept
        return seconds

    return move


def compare(case: Case, contenders: Sequence[Contender]) -> None:
    """Check that every contender's answer is the first one's.

    Raises:
        AnswersDifferError: one is not.
    """
    expected = contenders[0].answer()
    scale = math.sqrt(expected[0].numel() / case.channels)  # of a sum over the observations
    for contender in contenders[1:]:
        answer = contender.answer()
        for name, a, e in zip(ANSWERS[: len(answer)], answer, expected, strict=True):
            wrong = wrong_share(a, e, TOLERANCE[case.dtype] * (scale if a.dim() == 1 else 1))
            if wrong > (KINKS if a.dim() > 1 else 0):
                raise AnswersDifferError(
                    f"{contender.name} on {case}: {name} differs from that of {contenders[0].name} in {wrong:.2%} of "
                    "the values"
                )


def wrong_share(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """The share of values further off than tolerance x (1 + |expected|)."""
    return ((actual - expected).abs() > tolerance * (1 + expected.abs())).float().mean().item()


def peak(work: Callable[[], float | None]) -> int | None:
    """Bytes that this process needed at most while `work` ran, beyond what it had; None where Linux does not tell."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def keep_freed_memory() -> None:
    """Have the C library keep what is freed (glibc): the next tensor then lies in pages that are there already."""
    library = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4
    if not hasattr(library, "mallopt") or not all(
        library.mallopt(*setting) for setting in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1))
    ):
        raise BatchNormError("warm outputs need glibc's mallopt, which this system does not have")


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))


def write_json(path: Path, rows: Sequence[Row], *, warm: bool, gpu: Mapping[str, object] | None = None) -> None:
    """All rows, with the machine, the versions and the date, and the GPU that they were measured on."""
    document = {
        **run_information(),
        **({} if gpu is None else {"gpu": gpu}),
        "outputs": "warm" if warm else "fresh",
        "rows": [asdict(row) for row in rows],
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def run_information() -> dict[str, object]:
    """The date, the machine and the versions, for a file of results."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "kernels": batchnorm.kernels()[0].implementation,
            "platform": platform.platform(),
        },
        "versions": {
            "batchnorm": batchnorm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
