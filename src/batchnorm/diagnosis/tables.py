"""The tables of a report, for terminals and for pages alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.diagnosis.grouping import counted, layer_name, name_of
from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import Fix, ReportedLayer
from batchnorm.messages import one_line
from batchnorm.report.document import Table, percent

ROWS = 5  # of the layers in a terminal; a page has them all
MODES = {"running": "running", "exact": "exact (of these data)", "batch": "of each batch"}


def modes(report: Report) -> Table | None:
    """Inference with three kinds of statistics, a column each that was measured."""
    rows = report.modes
    if not rows:
        return None
    columns = {
        "outputs off by": [number(mode.distance) for mode in rows],
        "decisions changed": [share(mode.changed) for mode in rows],
        "loss": [number(mode.loss) for mode in rows],
    }
    there = {name: cells for name, cells in columns.items() if set(cells) != {""}}
    return Table(
        "The same batches in inference with different statistics; outputs are compared with those of exact ones",
        ("statistics", *there),
        [(MODES.get(mode.name, mode.name), *cells) for mode, *cells in zip(rows, *there.values(), strict=True)],
    )


def attribution(report: Report, rows: int | None = None) -> Table | None:
    """Which layers the gap comes from, those with the largest share first.

    Args:
        report: whose.
        rows: at most so many; None for all.
    """
    if not report.attribution:
        return None
    shown = report.attribution[:rows]
    left = len(report.attribution) - len(shown)
    more = f"; {counted(left, 'more layer')} in to_json" if left else ""
    gap = "in the loss" if report.measure == "loss" else "of the outputs"
    return Table(
        f"Which layers the gap {gap} comes from: how much of it closes when the layer alone is put right, and how much "
        f"is left when it alone is wrong{more}",
        ("layer", "closes", "is left"),
        [(layer_name(row.layer), share(row.closes), share(row.remains)) for row in shown],
    )


def layers(report: Report, rows: int | None = None) -> Table | None:
    """How far the statistics are from the population's, the worst layers first.

    Args:
        report: whose.
        rows: at most so many; None for all.
    """
    measured = sorted((layer for layer in report.layers if layer.off is not None), key=lambda layer: -(layer.off or 0))
    if not measured:
        return None
    shown = measured[:rows]
    left = len(measured) - len(shown)
    more = f"; {counted(left, 'layer')} that {'is' if left == 1 else 'are'} less far off left out" if left else ""
    return Table(
        f"How far the running statistics are from the data's: the worst channel of each layer{more}",
        ("layer", "channels", "mean, SD", "log variance ratio"),
        [
            (layer_name(r.name), f"{r.channels:,}", number(r.worst_shift), number(r.worst_log_variance_ratio))
            for r in shown
        ],
    )


def changes(before: Report, after: Report) -> Table:
    """How many findings of each code there were before, and are after."""
    codes = sorted({finding.code for report in (before, after) for finding in report.findings})
    return Table(
        "Findings before and after",
        ("check", "before", "after"),
        [(f"{code} {name_of(code)}".strip(), *(str(_count(report, code)) for report in (before, after)))
         for code in codes],
    )  # fmt: skip


def distances(before: Report, after: Report) -> Table | None:
    """How far statistics were off before, and are after, of the layers that changed."""
    old = {layer.name: layer for layer in before.layers}
    pairs = [(old[layer.name], layer) for layer in after.layers if layer.name in old]
    changed = [(a, b) for a, b in pairs if a.off is not None and a.off != b.off]
    changed.sort(key=lambda pair: -(pair[0].off or 0))
    if not changed:
        return None
    columns = ("layer", "mean, SD: before", "after", "log variance ratio: before", "after")
    return Table("The worst channel of each layer that changed", columns, [_both(*pair) for pair in changed])


def done(fixes: Sequence[Fix]) -> Table:
    """What was put right."""
    return Table(
        f"Put right: {counted(len(fixes), 'thing')}",
        ("layer", "check", "what", "before", "after"),
        [(layer_name(fix.layer), fix.code, *map(one_line, (fix.what, fix.before, fix.after))) for fix in fixes],
    )


def number(value: float | None) -> str:
    """Three digits; "" for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def share(value: float | None) -> str:
    """Per cent; "" for None."""
    if value is None:
        return ""
    return f"{percent(value)} %" if math.isfinite(value) else "not finite"


def _count(report: Report, code: str) -> int:
    return sum(finding.code == code for finding in report.findings)


def _both(old: ReportedLayer, new: ReportedLayer) -> tuple[str, ...]:
    return (
        layer_name(old.name),
        number(old.worst_shift),
        number(new.worst_shift),
        number(old.worst_log_variance_ratio),
        number(new.worst_log_variance_ratio),
    )
