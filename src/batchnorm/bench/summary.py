"""What the rows say: a table, and the ratios over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.bench.cuda import GRAPH, Gpu
from batchnorm.bench.measure import Row, geometric_mean
from batchnorm.report.document import Section, Table

CONTENDERS = ("torch", "native", "compile", "jax", "tensorflow")
LARGE = 8 * 10**6  # values, far beyond any cache
GRAPHS = tuple(name + GRAPH for name in ("ours", *CONTENDERS))


def section(rows: Sequence[Row], *, warm: bool, gpu: Gpu | None = None) -> Section:
    """A table with a line for each row, and a sentence for each contender and dtype.

    A ratio to a contender is its time over ours: above 1, ours is faster. The ratio to the floor is our time over the
    floor's: 1 would be the cost of moving the bytes. On a GPU there are, instead, the share of a copy's speed, and the
    ratios of graphs' replays.
    """
    there = {name for row in rows for name in row.seconds}
    contenders = [contender for contender in CONTENDERS if contender in there]
    graphs = [name for name in GRAPHS if name in there]
    if gpu is None:
        caption, bound = f"medians in ms; {'warm' if warm else 'fresh'} outputs", "over floor"
    else:
        caption = f"medians in ms on {gpu.name}, where a copy moves {gpu.copy_bytes_per_second / 1e9:.0f} GB/s"
        bound = "of a copy's speed"
    return Section(
        key="bench",
        title="BN + ReLU: ours and the others",
        summary=[
            *(sentence for contender in contenders for sentence in _sentences(rows, contender)),
            *([] if gpu else _between_dtypes(rows)),
        ],
        tables=[
            Table(
                caption=f"{caption}; x: the contender's time over ours",
                columns=(
                    "case",
                    "phase",
                    "ours",
                    *(f"{contender}, x" for contender in contenders),
                    *(f"{name}, {'ms' if name == graphs[0] else 'x'}" for name in graphs),
                    bound,
                    "peak, MiB: ours/torch",
                ),
                rows=[_cells(row, contenders, graphs) for row in rows],
            )
        ],
    )


def _sentences(rows: Sequence[Row], contender: str) -> list[str]:
    sentences = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        ratios = [
            (ratio, row)
            for row in rows
            if row.dtype == dtype and row.phase == "both" and (ratio := row.ratio(contender)) is not None
        ]
        if ratios:
            mean = geometric_mean([ratio for ratio, _ in ratios])
            worst, row = min(ratios, key=lambda pair: pair[0])
            sentences.append(
                f"Forward and backward, {dtype}, against {contender}: geometric mean {mean:.2f} over {len(ratios)} "
                f"cases, least {worst:.2f} at {row.shape}, {row.layout}{', with a residual' * row.residual}."
            )
    return sentences


def _between_dtypes(rows: Sequence[Row]) -> list[str]:
    """Our times in half precision beside our own in float32, where memory should decide: half the bytes."""
    both = [row for row in rows if row.phase == "both" and math.prod(row.shape) > LARGE]
    float32 = {_case(row): row.seconds["ours"] for row in both if row.dtype == "float32"}
    sentences = []
    for dtype in dict.fromkeys(row.dtype for row in both if row.dtype != "float32"):
        ratios = [
            (float32[_case(row)] / row.seconds["ours"], row)
            for row in both
            if row.dtype == dtype and _case(row) in float32
        ]
        if ratios:
            least, row = min(ratios, key=lambda pair: pair[0])
            mean = geometric_mean([ratio for ratio, _ in ratios])
            sentences.append(
                f"Above {LARGE // 10**6} million values, ours in {dtype} is {mean:.2f} times as fast as in float32 "
                f"(geometric mean of {len(ratios)} cases, least {least:.2f} at {row.shape}, {row.layout})."
            )
    return sentences


def _case(row: Row) -> tuple[tuple[int, ...], str, bool]:
    return row.shape, row.layout, row.residual


def _cells(row: Row, contenders: Sequence[str], graphs: Sequence[str]) -> tuple[str, ...]:
    ratios = [row.ratio(contender) for contender in contenders]
    ours = row.seconds.get(GRAPHS[0])
    replays = ["" if ours is None else f"{1e3 * ours:.4f}"] * bool(graphs)
    replays += ["" if ours is None else f"{row.seconds[name] / ours:.2f}" for name in graphs[1:]]
    if "floor" in row.seconds:
        bound = f"{row.seconds['ours'] / row.seconds['floor']:.2f}"
    else:
        bound = "" if row.copy_share is None else f"{row.copy_share:.0%}"
    peaks = (row.peak_bytes.get(name) for name in ("ours", "torch"))
    return (
        f"{row.shape} {row.layout} {row.dtype}" + " + residual" * row.residual,
        row.phase,
        f"{1e3 * row.seconds['ours']:.3f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        *replays,
        bound,
        "/".join("?" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
    )
