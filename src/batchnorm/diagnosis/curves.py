"""A page of a monitor's file: a section for each layer, with its curves over the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from batchnorm.diagnosis.records import LayerRecord, Spread, from_json
from batchnorm.errors import UsageError
from batchnorm.files import reading
from batchnorm.models.norm_layers import display_name
from batchnorm.report.document import Chart, Curve, Document, Section

# A chart for each line: its title, its unit, and what it shows; None of a record is a gap.
_CHARTS = (
    ("The batch and the running mean", "standard deviations", ("shift", "drift")),
    ("The batch and the running variance", "log ratio", ("log_variance_ratio", "log_variance_drift")),
    ("Batch to batch", "multiples of the square-root law", ("noise",)),
    ("Gamma and beta", "value", ("weight", "bias")),
    ("Their gradients", "L2 norm", ("weight_gradient", "bias_gradient")),
    ("Dead channels", "share", ("dead",)),
    ("Effective learning rate", "lr / |w|^2", ("effective_learning_rate",)),
)
_LOGARITHMIC = frozenset({"noise", "weight_gradient", "effective_learning_rate"})


def read(path: Path) -> tuple[list[LayerRecord], int]:
    """The records of a file's last training run, and how many lines are of runs before it.

    A last line without an end, of a run that was killed, is left out.

    Raises:
        UsageError: the file cannot be read, or a line is none of a monitor's.
    """
    runs: list[str] = []
    records: list[LayerRecord] = []
    with reading(path):
        text = path.read_bytes().decode()
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            run, record = from_json(line)
        except (ValueError, RecursionError) as error:
            wrong = "it is not JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else str(error)
            raise UsageError(f"cannot read line {number} of {path}: {wrong}") from error
        runs.append(run)
        records.append(record)
    if not records:
        raise UsageError(f"got {path} without a record; a monitor writes one for each layer and recorded step")
    last = [record for run, record in zip(runs, records, strict=True) if run == runs[-1]]
    return last, len(records) - len(last)


def document(records: Sequence[LayerRecord], source: str, others: int = 0) -> Document:
    """The page.

    Args:
        records: of one run.
        source: the file's name.
        others: how many lines of the file are of other runs.
    """
    by_layer: dict[str, list[LayerRecord]] = {}
    for record in sorted(records, key=lambda record: record.step):
        by_layer.setdefault(record.layer, []).append(record)
    steps = sorted({record.step for record in records})
    return Document(
        "Batch norm in training",
        f"{len(by_layer)} layers in steps {steps[0]} to {steps[-1]}, of which {len(steps)} are recorded. Lines are "
        f"medians over a layer's channels, bands reach from the least to the greatest.",
        [_section(i, layer, rows) for i, (layer, rows) in enumerate(by_layer.items())],
        f"batchnorm monitor {source}",
        [("file", source), *([("lines of earlier runs", str(others))] if others else [])],
    )


def summary(record: LayerRecord) -> str:
    """A layer's last record in one line."""
    parts = [f"{record.channels} channels"]
    if record.shift is not None:
        parts.append(
            f"the last batch's mean is at most {_extreme(record.shift):.2g} standard deviations from the running mean"
        )
    if record.log_variance_ratio is not None:
        parts.append(f"log variance ratio at most {_extreme(record.log_variance_ratio):.2g}")
    if record.dead is not None:
        parts.append(f"{record.dead:.0%} of the channels are dead")
    if record.non_finite:
        parts.append(f"{record.non_finite} channels were not finite")
    if record.skipped:
        parts.append(f"{record.skipped} batches were held back")
    return "; ".join(parts)


def _extreme(spread: Spread) -> float:
    return max(abs(spread.min), abs(spread.max))


def _section(number: int, layer: str, rows: Sequence[LayerRecord]) -> Section:
    name = f"layer {layer}" if layer else display_name(layer)
    charts = [chart for title, unit, names in _CHARTS if (chart := _chart(name, title, unit, names, rows)) is not None]
    return Section(f"layer-{number}", name, [f"At step {rows[-1].step}: {summary(rows[-1])}."], charts=charts)


def _chart(layer: str, title: str, unit: str, names: Sequence[str], rows: Sequence[LayerRecord]) -> Chart | None:
    """Curves of some quantities; None where no record has any."""
    curves = [_curve(name, rows) for name in names if any(getattr(row, name) is not None for row in rows)]
    if not curves:
        return None
    last = ", ".join(f"{c.label} {v:.3g}" for c in curves for v in [c.middle[-1]] if v is not None)
    return Chart(
        title,
        f"{title} of {layer} over {len(rows)} records; at the last, {last or 'nothing'}.",
        "step",
        unit,
        curves,
        log_y=names[0] in _LOGARITHMIC,
    )


def _curve(name: str, rows: Sequence[LayerRecord]) -> Curve:
    values = [getattr(row, name) for row in rows]
    label, steps = name.replace("_", " "), [row.step for row in rows]
    spreads = [value if isinstance(value, Spread) else None for value in values]
    if not any(spreads):
        return Curve(label, steps, values)
    low, middle, high = (
        [None if spread is None else getattr(spread, which) for spread in spreads] for which in ("min", "median", "max")
    )
    return Curve(label, steps, middle, low, high)
