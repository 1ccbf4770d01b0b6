"""A report as a document, which `batchnorm.report.page` makes one HTML file of."""

from __future__ import annotations

import bisect
import itertools
import math
import platform
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from batchnorm.diagnosis import tables
from batchnorm.diagnosis.catalogue import CHECKS
from batchnorm.diagnosis.finding import Severity
from batchnorm.diagnosis.grouping import Group, counted, grouped, layer_name, scope, tally
from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import ReportedLayer
from batchnorm.messages import one_line
from batchnorm.report.document import (
    Cell,
    Document,
    Histogram,
    Judged,
    Outcome,
    Profile,
    Section,
    Strip,
    Table,
)

OUTCOMES: dict[Severity, Outcome] = {"error": "no", "warning": "open", "info": "note"}
EVIDENCE = 3  # tables of one code: of what hurts most
ROWS = 20  # of the attribution: the rest is in to_json
COMMAND = 'report = bn.check(model, batches)\nreport.to_html("report.html")'
# In standard deviations, and in log variance ratios alike: half decades, which are the bins of the histograms too. A
# tenth is what the average of a few dozen batches is off by anyway; three times the variance, or 1 SD, ruins a layer.
BOUNDS = (0.1, 0.3, 1.0, 3.0)
LEGEND = ("below 0.1", "0.1 to 0.3", "0.3 to 1", "1 to 3", "3 and more, or not finite")
_EDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the bins to the right of 0; to the left likewise
_TICKS = ((-10.0, "\N{MINUS SIGN}10"), (-1.0, "\N{MINUS SIGN}1"), (-0.1, "\N{MINUS SIGN}0.1"), (0.0, "0"),
          (0.1, "0.1"), (1.0, "1"), (10.0, "10"))  # fmt: skip


def document(report: Report, *, command: str = COMMAND, facts: Sequence[tuple[str, str]] = ()) -> Document:
    """The report as a document.

    Args:
        report: what to show.
        command: what makes it again.
        facts: names and values of what it ran on, besides torch and Python.
    """
    measured = any(layer.off is not None for layer in report.layers)
    sections = [
        *([] if report.before is None else [_changes(report.before, report)]),
        *map(_findings, grouped(report.findings)),
        *_gap(report),
        *([_layers(report)] if report.layers else []),
    ]
    return Document(
        title="What is wrong with the batch norm" if report.findings else "Nothing wrong with the batch norm",
        introduction=f"Batch norm examined {scope(report)}.",
        sections=sections,
        command=command,
        facts=[*facts, ("torch", torch.__version__), ("Python", platform.python_version())],
        tally=_tally(report),
        strips=[_strip(report, "The network, in the model's order")] if measured else [],
        named=True,
    )


def _tally(report: Report) -> list[tuple[Outcome, int, str]]:
    if not report.findings:
        return [("yes", 0, "findings")]
    return [(OUTCOMES[severity], number, word) for severity, number, word in tally(report)]


def _findings(group: Group) -> Section:
    check = CHECKS.get(group.code)
    criterion = check.found if check else group.title
    evidence = [f for f in group.findings if f.evidence is not None][:EVIDENCE]
    return Section(
        key=f"{group.code}-{group.severity}",
        title=group.title,
        summary=[*([f"Remedy: {check.remedy}."] if check else []), *_all_alike(group)],
        judged=[
            Judged(
                f"{group.code} {line.layer}" + (f" and {counted(line.more, 'more layer')}" if line.more else ""),
                OUTCOMES[group.severity],
                group.severity,
                criterion,
                line.message,
            )
            for line in group.lines()
        ],
        tables=[
            Table(f"{layer_name(f.layer)}: {f.evidence.caption}", f.evidence.columns, f.evidence.rows)
            for f in evidence
            if f.evidence is not None
        ]
        + _all(group),
        notes=[f"batchnorm explain {group.code} tells why it hurts, how it is measured, and shows an example."]
        if check
        else [],
        code=group.remedy(),
        code_title="What to type",
    )


def _all_alike(group: Group) -> list[str]:
    """The layers of which all the same is said, where there are several."""
    if len(group.lines()) > 1 or len(group.findings) == 1:
        return []
    return [f"The layers are {', '.join(layer_name(finding.layer) for finding in group.findings)}."]


def _all(group: Group) -> list[Table]:
    """What is said of all layers, where the lines leave some out."""
    rows = [(layer_name(finding.layer), one_line(finding.message)) for finding in group.findings]
    there = 1 < len(group.lines()) < len(rows)
    return [Table(f"All {len(rows):,} layers", ("layer", "what is"), rows)] if there else []


def _gap(report: Report) -> Iterator[Section]:
    """What the statistics do to inference, and through which layers."""
    found = [table for table in (tables.modes(report), tables.attribution(report, ROWS)) if table is not None]
    if found:
        yield Section(
            key="gap",
            title="What do the running statistics do to inference?",
            summary=[
                "The same batches went through the network in inference with its running statistics, with the exact "
                "ones of these data, and with those of each batch."
            ],
            tables=found,
            notes=["A layer alone put right: all others keep their running statistics. A layer alone wrong: all others "
                   "have exact ones."],
        )  # fmt: skip


def _changes(before: Report, after: Report) -> Section:
    distances = tables.distances(before, after)
    measured = any(layer.off is not None for layer in before.layers)
    return Section(
        key="changes",
        title="What has been put right?",
        summary=[f"Before: {counted(len(before.findings), 'finding')}. After: {len(after.findings):,}."],
        tables=[tables.changes(before, after), *([] if distances is None else [distances])],
        strips=[_strip(before, "Before"), _strip(after, "After")] if measured else [],
    )


def _strip(report: Report, title: str) -> Strip:
    return Strip(
        f"{title}: each layer as high as its statistics are off, in SD or log variance ratio at the worst channel",
        [Cell(f"{layer_name(r.name)}: {_distance(r)}", _level(r.off), _key(i)) for i, r in enumerate(report.layers)],
        LEGEND,
    )


def _layers(report: Report) -> Section:
    codes: dict[str, list[str]] = {}
    for finding in report.findings:
        codes.setdefault(finding.layer, []).append(finding.code)
    return Section(
        key="layers",
        title="How far off is each layer?",
        summary=["All channels of all layers, in the model's order. Both scales are logarithmic from 0.03 on."]
        if any(layer.shift is not None for layer in report.layers)
        else ["Without data, only what the layers are."],
        profiles=[
            Profile(_key(i), layer_name(layer.name), _facts(layer, codes.get(layer.name, [])), _histograms(layer))
            for i, layer in enumerate(report.layers)
        ],
        tables=[_skipped(report)] if report.skipped else [],
        notes=[
            "Shift of the mean: running mean minus the data's, in standard deviations of the data.",
            "Log variance ratio: log((running variance + eps) / (the data's + eps)); 0.7 is twice the variance.",
        ],
    )


def _skipped(report: Report) -> Table:
    rows = [(layer_name(layer.name), one_line(layer.reason)) for layer in report.skipped]
    return Table("Not examined", ("layer", "why"), rows)


def _key(i: int) -> str:
    return f"layer-{i}"


def _distance(layer: ReportedLayer) -> str:
    if layer.off is None:
        return "no numbers"
    shift, ratio = tables.number(layer.worst_shift), tables.number(layer.worst_log_variance_ratio)
    return f"mean off by {shift} SD, log variance ratio {ratio}"


def _facts(layer: ReportedLayer, codes: Sequence[str]) -> str:
    facts = [layer.kind, counted(layer.channels, "channel")]
    if layer.input_shape is not None:
        facts.append("input " + " \N{MULTIPLICATION SIGN} ".join(map(str, layer.input_shape)))
    if layer.off is not None:
        facts.append(f"at worst {_distance(layer)}")
    return ", ".join(filter(None, facts)) + (f"; {', '.join(dict.fromkeys(codes))}" if codes else "")


def _histograms(layer: ReportedLayer) -> list[Histogram]:
    titled = (("Shift of the mean, SD", layer.shift), ("Log variance ratio", layer.log_variance_ratio))
    return [_histogram(title, values) for title, values in titled if values is not None and values.numel()]


def _histogram(title: str, values: Tensor) -> Histogram:
    """Bins of half a decade to both sides of 0; those at the ends have all that is beyond, and what is not finite."""
    edges = [*(-edge for edge in reversed(_EDGES)), *_EDGES]
    numbers: list[float] = values.tolist()
    counts = [0] * (len(edges) + 1)
    for value in numbers:
        counts[bisect.bisect(edges, value) if not math.isnan(value) else -1] += 1
    middles = [edges[0], *(min(pair, key=abs) for pair in itertools.pairwise(edges)), edges[-1]]
    middles[len(_EDGES)] = 0.0
    ordered = sorted(value for value in numbers if math.isfinite(value))
    words = f"{title}: {counted(len(numbers), 'channel')}"
    if ordered:
        median = ordered[len(ordered) // 2]
        words += f", from {ordered[0]:.3g} over {median:.3g} in the middle to {ordered[-1]:.3g}"
    if bad := len(numbers) - len(ordered):
        words += f", {bad:,} not finite"
    ticks = [(_position(value, edges), word) for value, word in _TICKS]
    return Histogram(title, words, counts, [_level(middle) or 0 for middle in middles], ticks)


def _position(value: float, edges: Sequence[float]) -> float:
    """Where a tick stands, in bins from the left end; 0 is in the middle of its bin."""
    return len(edges) / 2 + 0.5 if value == 0 else edges.index(value) + 1.0


def _level(value: float | None) -> int | None:
    return None if value is None else bisect.bisect(BOUNDS, abs(value))
