"""What the report of `recompute` says."""

from __future__ import annotations

from batchnorm.memory.report import Entry, Report

ENTRIES = (
    Entry("stem", 3 * 2**20, 0),
    Entry("body.0", 2**19, 2**20, "its output is changed in place afterwards"),
    Entry("head", 0, 0, "nobody saves its output"),
)


def test_numbers() -> None:
    report = Report(ENTRIES, kept=5 * 2**20, between=2**19)
    assert report.saved == 4 * 2**20
    assert report.recomputed == ("stem", "body.0")
    assert report.left == {"head": "nobody saves its output"}
    assert list(report) == list(ENTRIES)
    assert len(report) == 3


def test_text() -> None:
    assert str(Report(ENTRIES, kept=4 * 2**20, between=2**19)) == (
        "2 of 3 layers recomputed: 4.0 MiB saved, 4.0 MiB kept (50% less)\n"
        "stem    3.0 MiB saved\n"
        "body.0  512 KiB saved; left: its output is changed in place afterwards\n"
        "head    left: nobody saves its output\n"
        "        512 KiB saved between the layers"
    )


def test_nothing() -> None:
    assert str(Report((), 0, 0)) == "0 of 0 layers recomputed: 0 KiB saved, 0 KiB kept (0% less)"
    assert str(Report((), 0, 0, "nothing: because")) == "nothing: because"
