"""Reports: entries, what was done and left, text."""

from __future__ import annotations

import pytest
from torch import nn

import batchnorm as bn
from batchnorm.surgery.report import Entry, Report, attach, check_free

ENTRIES = (Entry("a.bn", True, "part of a.conv"), Entry("b", False, "it has hooks"))


def test_a_report_iterates_and_prints() -> None:
    report = Report("folded", ENTRIES, 1.25e-7)
    assert list(report) == list(ENTRIES)
    assert len(report) == 2
    assert report.done == {"a.bn": "part of a.conv"}
    assert report.left == {"b": "it has hooks"}
    assert str(report).splitlines() == [
        "1 of 2 folded, outputs differ by at most 1.2e-07 of their largest value",
        "a.bn  part of a.conv",
        "b     left: it has hooks",
    ]
    assert str(Report("fused", ())) == "0 of 0 fused"


def test_attach_sets_and_sets_again() -> None:
    model = nn.Linear(2, 2)
    check_free(model)
    assert attach(model, "fused", ENTRIES) is model
    check_free(model)
    assert attach(model, "folded", ENTRIES, 0.5).report.operation == "folded"
    assert list(model.state_dict()) == ["weight", "bias"]


def test_a_report_of_the_models_own_is_not_hidden() -> None:
    class Mine(nn.Module):
        def report(self) -> None: ...

    with pytest.raises(bn.BatchNormError, match=r"got a model of .*Mine that has a `report` of its own"):
        check_free(Mine())
