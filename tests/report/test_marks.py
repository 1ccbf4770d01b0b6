"""Small drawings."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from batchnorm.report.document import Histogram
from batchnorm.report.marks import histogram

CONTENT = Histogram("title", 'what "it" <shows> & more', [0, 1, 1000, 500], [4, 1, 0, 2], [(0.0, "<0"), (2.5, "1 & 2")])


def drawn() -> ElementTree.Element:
    return ElementTree.fromstring(histogram(CONTENT))


def test_it_is_one_element_with_a_label_that_scales() -> None:
    root = drawn()
    assert (root.tag, root.get("role"), root.get("aria-label")) == ("svg", "img", CONTENT.description)
    assert root.get("viewBox") == "0 0 72 59"
    assert root.get("width") is None


def test_bars_are_as_high_as_their_counts_and_a_single_value_can_be_seen() -> None:
    bars = [path for path in drawn().iter("path") if path.get("class") != "axis"]
    heights = [float(re.findall(r"v-([\d.]+)", bar.get("d") or "")[0]) for bar in bars]
    assert heights == [2, 44, 22]
    assert [bar.get("class") for bar in bars] == ["level-1", "level-0", "level-2"], "an empty bin has none"
    assert [(bar.get("d") or "").split()[0] for bar in bars] == ["M19", "M37", "M55"]


def test_ticks_have_words() -> None:
    assert [(text.get("x"), text.text) for text in drawn().iter("text")] == [("0", "<0"), ("45", "1 & 2")]


def test_an_empty_histogram_is_an_axis() -> None:
    root = ElementTree.fromstring(histogram(Histogram("t", "d", [0, 0], [0, 0], [])))
    assert [path.get("class") for path in root.iter("path")] == ["axis"]


def test_every_bin_has_a_level() -> None:
    with pytest.raises(ValueError, match="zip"):
        histogram(Histogram("t", "d", [1, 2], [0], []))
