"""A page of a monitor's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import batchnorm as bn
from batchnorm.diagnosis import curves
from batchnorm.diagnosis.records import LayerRecord, Spread
from batchnorm.errors import UsageError
from batchnorm.report.page import page
from diagnosis.training import LAYERS, network, sgd, train


def written(path: Path, steps: int = 4) -> Path:
    model = network()
    with bn.Monitor(model, every=2, writer=path):
        train(model, sgd(model), steps)
    return path


def test_the_last_run_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written(path)
    written(path, steps=6)
    records, others = curves.read(path)
    assert [record.step for record in records] == [step for step in (2, 4, 6) for _ in LAYERS]
    assert others == 2 * len(LAYERS)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "run.jsonl")
    path.write_bytes(path.read_bytes()[:-10])
    records, _ = curves.read(path)
    assert len(records) == 2 * len(LAYERS) - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "without a record"),
        (b"{}\n", "cannot read line 1 of .*: it is not an object of version 1"),
        (b"what\n", "cannot read line 1 of .*: it is not JSON"),
        (b"[" * 100_000 + b"\n", "cannot read line 1 of .*: it is not JSON"),
        (b"\xff\n", "cannot read .*utf-8"),
    ],
    ids=["empty", "another object", "no JSON", "deep", "no text"],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (path := tmp_path / "run.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        curves.read(path)


def test_the_document(tmp_path: Path) -> None:
    records, _ = curves.read(written(tmp_path / "run.jsonl"))
    document = curves.document(records, "run.jsonl")
    assert [section.title for section in document.sections] == [f"layer {name}" for name in LAYERS]
    first = document.sections[0]
    chart = next(chart for chart in first.charts if chart.title == "The batch and the running mean")
    shift, drift = chart.curves
    rows = [record for record in records if record.layer == "1"]
    assert list(shift.x) == [2, 4]
    assert shift.middle == [row.shift.median for row in rows if row.shift]
    assert shift.low == [row.shift.min for row in rows if row.shift]
    assert drift.middle == [None, rows[1].drift.median if rows[1].drift else None]
    assert page(document).count("<svg") > 3 * 6


def test_a_layer_without_anything_has_no_charts_of_it(tmp_path: Path) -> None:
    records, _ = curves.read(written(tmp_path / "run.jsonl"))
    bare = [replace(r, shift=None, drift=None, dead=None, layer="<b>\u202e") for r in records if r.layer == "1"]
    document = curves.document(bare, "run.jsonl")
    titles = [chart.title for chart in document.sections[0].charts]
    assert "Dead channels" not in titles
    assert "The batch and the running mean" not in titles
    assert "<b>" not in page(document)


def test_a_summary() -> None:
    nothing: dict[str, None] = dict.fromkeys(field for field in LayerRecord.__dataclass_fields__)
    record = LayerRecord(**nothing | {"step": 1, "layer": "a", "channels": 3, "non_finite": 2, "skipped": 4})
    assert curves.summary(record) == "3 channels; 2 channels were not finite; 4 batches were held back"
    spread = Spread(-2, 0, 0, 0, 1)
    record = replace(record, shift=spread, log_variance_ratio=spread, dead=0.25, non_finite=0, skipped=0)
    assert curves.summary(record) == (
        "3 channels; the last batch's mean is at most 2 standard deviations from the running mean; "
        "log variance ratio at most 2; 25% of the channels are dead"
    )
