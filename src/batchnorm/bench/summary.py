"""What the rows say: a table, and the ratios over all of them."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.bench.measure import Row, geometric_mean
from batchnorm.report.document import Section, Table

RIVALS = ("torch", "compile", "jax", "tensorflow")


def section(rows: Sequence[Row], *, warm: bool) -> Section:
    """A table with a line for each row, and a sentence for each rival and dtype.

    A ratio to a rival is its time over ours: above 1, ours is faster. The ratio to the floor is ours over the floor's:
    1 would be the cost of moving the bytes.
    """
    rivals = [rival for rival in RIVALS if any(rival in row.seconds for row in rows)]
    return Section(
        key="bench",
        title="BN + ReLU: ours and the others",
        summary=[sentence for rival in rivals for sentence in _sentences(rows, rival)],
        tables=[
            Table(
                caption=f"medians in ms; {'warm' if warm else 'fresh'} outputs; x: the rival's time over ours",
                columns=(
                    "case",
                    "phase",
                    "ours",
                    *(f"{rival}, x" for rival in rivals),
                    "over floor",
                    "peak, MiB: ours/torch",
                ),
                rows=[_cells(row, rivals) for row in rows],
            )
        ],
    )


def _sentences(rows: Sequence[Row], rival: str) -> list[str]:
    sentences = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        ratios = [
            (ratio, row)
            for row in rows
            if row.dtype == dtype and row.phase == "both" and (ratio := row.ratio(rival)) is not None
        ]
        if ratios:
            mean = geometric_mean([ratio for ratio, _ in ratios])
            worst, row = min(ratios, key=lambda pair: pair[0])
            sentences.append(
                f"Forward and backward, {dtype}, against {rival}: geometric mean {mean:.2f} over {len(ratios)} cases, "
                f"least {worst:.2f} at {row.shape}, {row.layout}."
            )
    return sentences


def _cells(row: Row, rivals: Sequence[str]) -> tuple[str, ...]:
    ratios = (row.ratio(rival) for rival in rivals)
    peaks = (row.peak_bytes.get(name) for name in ("ours", "torch"))
    return (
        f"{row.shape} {row.layout} {row.dtype}",
        row.phase,
        f"{1e3 * row.seconds['ours']:.3f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{row.seconds['ours'] / row.seconds['floor']:.2f}",
        "/".join("?" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
    )
