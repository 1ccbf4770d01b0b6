"""What the rows say: a table, and the ratios over all of them."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.bench.measure import Row, geometric_mean
from batchnorm.report.document import Section, Table

CONTENDERS = ("torch", "compile", "jax", "tensorflow")


def section(rows: Sequence[Row], *, warm: bool) -> Section:
    """A table with a line for each row, and a sentence for each contender and dtype.

    A ratio to a contender is its time over ours: above 1, ours is faster. The ratio to the floor is our time over the
    floor's: 1 would be the cost of moving the bytes.
    """
    contenders = [contender for contender in CONTENDERS if any(contender in row.seconds for row in rows)]
    return Section(
        key="bench",
        title="BN + ReLU: ours and the others",
        summary=[sentence for contender in contenders for sentence in _sentences(rows, contender)],
        tables=[
            Table(
                caption=f"medians in ms; {'warm' if warm else 'fresh'} outputs; x: the contender's time over ours",
                columns=(
                    "case",
                    "phase",
                    "ours",
                    *(f"{contender}, x" for contender in contenders),
                    "over floor",
                    "peak, MiB: ours/torch",
                ),
                rows=[_cells(row, contenders) for row in rows],
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
                f"cases, least {worst:.2f} at {row.shape}, {row.layout}."
            )
    return sentences


def _cells(row: Row, contenders: Sequence[str]) -> tuple[str, ...]:
    ratios = (row.ratio(contender) for contender in contenders)
    peaks = (row.peak_bytes.get(name) for name in ("ours", "torch"))
    return (
        f"{row.shape} {row.layout} {row.dtype}",
        row.phase,
        f"{1e3 * row.seconds['ours']:.3f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{row.seconds['ours'] / row.seconds['floor']:.2f}",
        "/".join("?" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
    )
