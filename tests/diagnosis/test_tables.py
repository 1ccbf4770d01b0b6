"""The numbers of a report as tables."""

from __future__ import annotations

import math

from batchnorm.diagnosis import tables
from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import Fix, LayerAttribution, Mode
from diagnosis.reports import fixed, full, not_finite, reported


def test_modes_have_the_columns_that_were_measured() -> None:
    table = tables.modes(full())
    assert table is not None
    assert list(table.columns) == ["statistics", "outputs off by", "decisions changed", "loss"]
    assert table.rows[0] == ("running", "0.81", "62.0 %", "2.31")
    without = tables.modes(Report([], [], modes=[Mode("running", 0.5), Mode("exact", 0.0)]))
    assert without is not None
    assert list(without.columns) == ["statistics", "outputs off by"]
    assert tables.modes(Report([], [])) is None


def test_what_is_not_finite_is_said() -> None:
    table = tables.modes(not_finite())
    assert table is not None
    assert table.rows == [("running", "not finite", "not finite")]
    layers = tables.layers(not_finite())
    assert layers is not None
    assert [row[0] for row in layers.rows] == ["bad", "good"]
    assert layers.rows[0][2] == "not finite"
    assert tables.share(math.nan) == "not finite"


def test_attribution_says_what_it_leaves_out() -> None:
    report = Report([], [], attribution=[LayerAttribution(name, 0.5, 0.25) for name in "abc"], measure="loss")
    table = tables.attribution(report, 2)
    assert table is not None
    assert table.rows == [("a", "50.0 %", "25.0 %"), ("b", "50.0 %", "25.0 %")]
    assert "in the loss" in table.caption
    assert "1 more layer" in table.caption
    whole = tables.attribution(report)
    assert whole is not None
    assert len(whole.rows) == 3
    assert "more" not in whole.caption


def test_the_worst_layers_are_first() -> None:
    report = Report([], [reported("a", 0.1), reported("b", 3.0), reported("c", 0.0, -4.0)])
    table = tables.layers(report, 2)
    assert table is not None
    assert [row[0] for row in table.rows] == ["c", "b"]
    assert table.rows[1] == ("b", "8", "-3", "-0.05")
    assert "1 layer that is less far off" in table.caption


def test_before_and_after() -> None:
    after = fixed()
    assert after.before is not None
    rows = {row[0]: row[1:] for row in tables.changes(after.before, after).rows}
    assert rows["BN101 momentum-convention"] == ("12", "0")
    assert rows["BN201 dead-bias"] == ("1", "1")
    distances = tables.distances(after.before, after)
    assert distances is not None
    assert len(distances.rows) == 12, "what had no numbers before is not compared"
    assert distances.rows[0][1:] == ("-0.1", "-1e-07", "-5", "-1e-07")
    assert tables.distances(after, after) is None


def test_what_was_done() -> None:
    table = tables.done([Fix("BN301", "", "recalibrated", "3 SD", "0 SD")])
    assert table.rows == [("the model itself", "BN301", "recalibrated", "3 SD", "0 SD")]
    assert table.caption == "Put right: 1 thing"
