"""Small drawings as SVG, by hand: hundreds fit into a page, and need no package.

Colours are the page's: `level-0` and so on are its classes.
"""

from __future__ import annotations

from html import escape

from batchnorm.report.document import Histogram

_BIN, _HEIGHT, _BELOW = 18, 44, 15  # in units of the drawing, which are pixels where there is room
_LEAST = 2  # as high is a bar of a single value: it may be the one that matters


def histogram(content: Histogram) -> str:
    """One `<svg>` element, which scales to the width that it is given, and carries the description as label."""
    width, most = _BIN * len(content.counts), max([1, *content.counts])
    bars = "".join(
        f'<path class="level-{level}" fill="currentColor" '
        f'd="M{_BIN * i + 1} {_HEIGHT}v-{_bar(count, most)}h{_BIN - 2}V{_HEIGHT}z"/>'
        for i, (count, level) in enumerate(zip(content.counts, content.levels, strict=True))
        if count
    )
    marks = "".join(f"M{_BIN * x:g} {_HEIGHT}v3" for x, _ in content.ticks)
    words = "".join(
        f'<text x="{_BIN * x:g}" y="{_HEIGHT + _BELOW - 2}">{escape(word)}</text>' for x, word in content.ticks
    )
    return (
        f'<svg viewBox="0 0 {width} {_HEIGHT + _BELOW}" role="img" aria-label="{escape(content.description)}">'
        f'{bars}<path class="axis" d="M0 {_HEIGHT}H{width}{marks}"/>{words}</svg>'
    )


def _bar(count: int, most: int) -> str:
    return f"{max(_LEAST, _HEIGHT * count / most):.4g}"
