"""Reports as one HTML file that needs nothing else: no script, no network."""

from __future__ import annotations

import re
from collections import Counter
from typing import get_args

from batchnorm.report import charts, marks
from batchnorm.report.document import Document, Outcome, shown

_ROOMY = 22  # lines of the summary that fit one screen with room between them; more are set closer


def page(document: Document) -> str:
    """The document as HTML. All of its text is escaped; only the drawings are markup, and they are our own.

    Raises:
        ValueError: two sections or profiles have one key, or there are more curves in a chart than there are styles.
    """
    import jinja2
    from markupsafe import Markup

    document = shown(document)
    keys = [section.key for section in document.sections]
    keys += [profile.key for section in document.sections for profile in section.profiles]
    if len(set(keys)) < len(keys):
        raise ValueError(f"each section and each profile needs a key of its own, got {keys}")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["typeset"] = typeset
    environment.filters["histogram"] = lambda histogram: Markup(marks.histogram(histogram))
    drawings = {
        section.key: [Markup(charts.svg(chart, f"{section.key}-{i}")) for i, chart in enumerate(section.charts)]
        for section in document.sections
    }
    return environment.get_template("page.html.j2").render(
        document=document,
        drawings=drawings,
        tally=_tally(document),
        many=sum(max(1, len(section.judged)) for section in document.sections) > _ROOMY,
        styles=charts.STYLES,
    )


def typeset(text: str) -> str:
    """Text as a printer would set it: a minus that is one, and no line between a number and its per cent."""
    text = re.sub(r"(?<![^\s(])-(?=\.?\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)


def _tally(document: Document) -> list[tuple[Outcome, int, str]]:
    """How often each verdict was given: what holds first, what is open last."""
    if document.tally is not None:
        return list(document.tally)
    counts = Counter((row.outcome, row.verdict) for section in document.sections for row in section.judged)
    order: tuple[Outcome, ...] = get_args(Outcome)
    return sorted(
        ((outcome, count, verdict) for (outcome, verdict), count in counts.items()),
        key=lambda entry: (order.index(entry[0]), entry[2]),
    )
