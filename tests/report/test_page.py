"""The page, read as a browser reads it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from batchnorm.report.document import Cell, Chart, Curve, Document, Histogram, Judged, Profile, Section, Strip, Table
from batchnorm.report.page import page, typeset

HOSTILE = """<script>alert("x")</script> & '{{ 7 * 7 }}' https://example.org"""
PARTS = (
    *(
        "heading",
        "introduction",
        "question",
        "answer",
        "claim",
        "verdict",
        "criterion",
        "evidence",
        "margin",
        "caption",
    ),
    *("column", "cell", "title", "note", "code", "command", "fact", "strip", "legend", "thing", "about", "histogram"),
    "purpose",
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Collects what is in a page, and insists that every element is closed in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def document(words: str = "words", sections: int = 2) -> Document:
    curve = Curve(words, [1, 2], [0.5, 1.5], [0.25, 1.0], [1.0, 2.0])
    chart = Chart(f"title {words}", f"description {words}", words, words, [curve])
    table = Table(f"caption {words}", ("network", f"column {words}"), [("batch norm", f"cell {words}"), ("plain", "7")])
    judged = Judged(
        f"claim {words}", "no", f"verdict {words}", f"criterion {words}", f"evidence {words}", f"margin {words}"
    )
    section = Section(
        key="key",
        title=f"question {words}",
        summary=[f"answer {words}"],
        judged=[judged, replace(judged, outcome="yes")],
        tables=[table, table],
        charts=[chart, chart],
        notes=[f"note {words}"],
        code=f"code {words}",
        code_title=f"purpose {words}",
    )
    strip = Strip(
        f"strip {words}", [Cell(f"label {words}", level, "key-0") for level in (0, 4, None)], [f"legend {words}"]
    )
    histogram = Histogram(f"histogram {words}", f"numbers {words}", [3, 0, 1], [0, 1, 2], [(1.0, f"tick {words}")])
    drawn = [Profile(f"thing-{i}", f"thing {words}", f"about {words}", [histogram]) for i in range(2)]
    return Document(
        f"heading {words}",
        f"introduction {words}",
        [
            replace(section, key=f"key-{i}", strips=[strip] if i == 0 else [], profiles=drawn if i == 0 else [])
            for i in range(sections)
        ],
        f"command {words}",
        [("name", f"fact {words}")],
    )


@pytest.mark.parametrize("sections", [0, 1, 2])
def test_the_page_is_well_formed(sections: int) -> None:
    reader = read(page(document(sections=sections)))
    assert reader.count["html"] == reader.count["h1"] == reader.count["main"] == 1
    drawings = [value for name, value in reader.attributes if (name, value) == ("role", "img")]
    assert len(drawings) == reader.count["figure"] == reader.count["figcaption"] == 2 * sections + 2 * bool(sections)
    assert reader.count["table"] == 2 * sections


def test_everything_said_is_in_it() -> None:
    text = "".join(read(page(document())).text)
    for part in PARTS:
        assert f"{part} words" in text


def test_hostile_text_stays_text() -> None:
    html = page(document(HOSTILE))
    reader = read(html)
    assert reader.count["script"] == 0
    text = "".join(reader.text)
    for part in PARTS:
        assert f"{part} {HOSTILE}" in text
    for name, value in (
        ("aria-label", "description"),
        ("aria-label", "numbers"),
        ("aria-label", "label"),
        ("title", "label"),
    ):
        assert (name, f"{value} {HOSTILE}") in reader.attributes
    assert f"tick {HOSTILE}" in text


def test_nothing_is_loaded_from_anywhere() -> None:
    html = page(document())
    reader = read(html)
    assert not reader.count.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
            assert value.startswith("#"), f"{name}={value}"
    assert re.findall(r"url\(\s*['\"]?(?!#)", html) == []
    assert "@import" not in html
    assert any(name == "content" and value.startswith("default-src 'none'") for name, value in reader.attributes)


def test_ids_are_unique_and_labels_exist() -> None:
    reader = read(page(document()))
    ids = Counter(value for name, value in reader.attributes if name == "id")
    assert max(ids.values()) == 1
    named = {value for name, value in reader.attributes if name == "aria-labelledby"}
    assert named
    assert named <= ids.keys()


def test_the_summary_says_what_became_of_every_statement_and_leads_to_it() -> None:
    html = page(document(sections=3))
    summary = html[html.index('<section class="overview"') : html.index('<section class="part"')]
    assert re.findall(r"<b>(\d+)</b> verdict words", summary) == ["3", "3"], "what holds, and what does not"
    assert re.findall(r'<a href="#([\w-]+)">claim words</a>', summary) == [f"key-{i}" for i in (0, 0, 1, 1, 2, 2)]
    assert summary.count('class="evidence">evidence words<') == 6
    assert "margin" not in summary, "that is in the sections"


def test_where_the_evidence_decides_there_is_no_margin() -> None:
    content = document(sections=1)
    (section,) = content.sections
    bare = replace(content, sections=[replace(section, judged=[replace(row, margin="") for row in section.judged])])
    assert "<dt>Margin</dt>" in page(content)
    assert "<dt>Margin</dt>" not in page(bare)


def test_a_section_without_statements_is_in_the_summary_too() -> None:
    bare = Document("heading", "introduction", [Section("bare", "a question", ["an answer"])], "command", [])
    html = page(bare)
    read(html)
    assert '<a href="#bare">a question</a>' in html
    assert 'class="tally"' not in html
    assert "<table" not in html


def test_every_link_inside_leads_somewhere() -> None:
    reader = read(page(document()))
    ids = {value for name, value in reader.attributes if name == "id"}
    targets = {value.removeprefix("#") for name, value in reader.attributes if name == "href"}
    assert {"page-main", "page-summary", "key-0", "key-1"} <= targets
    assert targets <= ids


def test_two_sections_of_one_key_are_refused() -> None:
    twice = document(sections=1)
    with pytest.raises(ValueError, match=r"a key of its own.*key-0"):
        page(replace(twice, sections=[*twice.sections, *twice.sections]))


def test_a_cell_is_as_high_as_its_level_and_leads_to_its_thing() -> None:
    html = page(document(sections=1))
    assert re.findall(r'<li><a class="(level-\w+)" href="#([\w-]+)"', html) == [
        (f"level-{level}", "key-0") for level in (0, 4, "none")
    ]


def test_a_tally_of_its_own_takes_the_place_of_the_statements() -> None:
    html = page(replace(document(), tally=[("no", 3, "errors"), ("note", 1200, "info")]))
    assert re.findall(r"<b>(\d+)</b> (\w+)", html) == [("3", "errors"), ("1200", "info")]


def test_a_profile_with_the_key_of_a_section_is_refused() -> None:
    section = document(sections=1).sections[0]
    with pytest.raises(ValueError, match="a key of its own"):
        page(replace(document(), sections=[replace(section, profiles=[Profile(section.key, "a", "b")])]))


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("-1.4 points (-4.2 to -.5)", "\u22121.4 points (\u22124.2 to \u2212.5)"),
        ("92.2 % of 95 %", "92.2\u00a0% of 95\u00a0%"),
        ("88.1-97.9, batch-2, --out, 1e-05, a - b, half %", "88.1-97.9, batch-2, --out, 1e-05, a - b, half %"),
    ],
)
def test_numbers_are_set_with_care(text: str, printed: str) -> None:
    assert typeset(text) == printed


def test_code_is_left_as_it_is() -> None:
    section = Section("key", "title", ["down by -3"], code="x = -3 % 4")
    html = page(Document("heading", "introduction", [section], "batchnorm study --seed -3", []))
    assert "down by \u22123" in html
    assert "<code>x = -3 % 4</code>" in html
    assert "<code>batchnorm study --seed -3</code>" in html


def test_light_dark_print_and_phones_are_thought_of() -> None:
    html = page(document())
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert "@media print" in html
    assert ("name", "viewport") in read(html).attributes
    both = re.findall(r"(?:^|[^{]\n)\s*:root \{(.*?)\}", html, re.DOTALL)
    light, dark = (
        set(re.findall(r"(--[\w-]+): *#", "".join(rules)))
        for rules in (both, re.findall(r"prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", html, re.DOTALL))
    )
    assert light == dark, "every colour has a light and a dark value"
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) - {"--serif", "--sans", "--mono"} <= dark


def test_the_same_document_is_the_same_page() -> None:
    assert page(document()) == page(document())


def test_what_a_browser_would_obey_is_shown() -> None:
    """Names of others: directions of text, control characters, and what cannot be encoded."""
    html = page(document("a\u202egpj\x1b[2J\udcff\u2066"))
    html.encode()
    assert r"a\u202egpj\x1b[2J\udcff\u2066" in html
    assert not set(html) & {"\u202e", "\x1b", "\udcff", "\u2066"}
