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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import batchnorm
from batchnorm.bench.contenders import PHASES, Peer, Rival, Torch, compiled, ours, theirs
from batchnorm.bench.suites import Case
from batchnorm.errors import BatchNormError

# A case gets repeats until it has used this much time, within bounds.
SECONDS, FEWEST, MOST = 1.5, 7, 301
TURN = 2e-3
# Values whose ReLU may fall on either side of 0 in another rounding, of all values; and what the others may be off.
KINKS = 1e-3
TOLERANCE = {"float32": 2e-3, "bfloat16": 6e-2}


class AnswersDifferError(BatchNormError):
    """A rival's answer is not ours, so its time means nothing."""


@dataclass(frozen=True)
class Row:
    """One case, one phase.

    Attributes:
        suite: the case's suite.
        shape: the case's shape.
        layout: the case's layout.
        dtype: the case's dtype.
        phase: one of `PHASES`.
        seconds: of each rival, the median; ours under "ours", the floor under "floor".
        peak_bytes: memory that the process had at most beyond what it had before, of the rivals in this process; None
            where the system does not tell.
    """

    suite: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    phase: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int | None]

    def ratio(self, rival: str) -> float | None:
        """The rival's time over ours: above 1, ours is faster."""
        return self.seconds[rival] / self.seconds["ours"] if rival in self.seconds else None


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
        advance: called with every row when it is there.

    Raises:
        AnswersDifferError: a rival computes something else.
        UsageError: a peer's environment is missing.
    """
    if warm:
        keep_freed_memory()
    rivals: list[Rival] = [Torch("ours", ours), Torch("torch", theirs)]
    rivals += [Torch("compile", compiled)] if compile else []
    started = [Peer(name, peers) for name in ("jax", "tensorflow")] if peers is not None else []
    rows = []
    try:
        for case in cases:
            taking_part = [rival for rival in (*rivals, *started) if rival.load(case)]
            compare(case, taking_part)
            for phase in PHASES:
                row = measure(case, phase, taking_part)
                rows.append(row)
                advance(row)
            for rival in taking_part:
                rival.close()
    finally:
        for peer in started:
            peer.stop()
    return rows


def measure(case: Case, phase: str, rivals: Sequence[Rival]) -> Row:
    """One row: every rival and the floor in turn, until there is time for no more."""
    works: dict[str, Callable[[], float | None]] = {rival.name: partial(rival.run, phase) for rival in rivals}
    works["floor"] = floor(case, phase)
    peaks = {name: peak(work) if name in ("ours", "torch", "compile") else None for name, work in works.items()}
    first = {name: seconds for name, work in works.items() if (seconds := work()) is not None}
    # Short work is done a few times in a turn: as in a training loop, its code is then in the cache.
    turns = {name: min(MOST, max(1, int(TURN / seconds))) for name, seconds in first.items()}
    total = sum(seconds * turns[name] for name, seconds in first.items())
    repeats = min(MOST, max(FEWEST, int(SECONDS / total)))
    times: dict[str, list[float]] = {name: [] for name in first}
    for _ in range(repeats):
        for name, values in times.items():
            values.append(statistics.fmean(works[name]() or 0.0 for _ in range(turns[name])))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Row(case.suite, case.shape, case.layout, case.dtype, phase, medians, peaks)


def floor(case: Case, phase: str) -> Callable[[], float]:
    """The same bytes moved by the fastest copy or addition, into new tensors, as the rivals'.

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


def compare(case: Case, rivals: Sequence[Rival]) -> None:
    """Every rival's answer is the first one's.

    Raises:
        AnswersDifferError: one is not.
    """
    expected = rivals[0].answer()
    scale = math.sqrt(expected[0].numel() / case.channels)  # of a sum over the observations
    for rival in rivals[1:]:
        for name, a, e in zip(("y", "dx", "dweight", "dbias"), rival.answer(), expected, strict=True):
            wrong = wrong_share(a, e, TOLERANCE[case.dtype] * (scale if a.dim() == 1 else 1))
            if wrong > (KINKS if a.dim() > 1 else 0):
                raise AnswersDifferError(
                    f"{rival.name} on {case}: {name} differs from ours in {wrong:.2%} of the values"
                )


def wrong_share(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """The share of values further off than tolerance x (1 + |expected|)."""
    return ((actual - expected).abs() > tolerance * (1 + expected.abs())).float().mean().item()


def peak(work: Callable[[], float | None]) -> int | None:
    """Bytes that this process needed at most while `work` ran, beyond what it had; None where Linux does not tell."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
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


def write_json(path: Path, rows: Sequence[Row], *, warm: bool) -> None:
    """All rows, with the machine, the versions and the date."""
    document = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "outputs": "warm" if warm else "fresh",
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
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
