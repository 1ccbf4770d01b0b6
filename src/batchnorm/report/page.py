"""Reports as one HTML file that needs nothing else: no script, no network."""

from __future__ import annotations

from batchnorm.report import charts
from batchnorm.report.document import Document


def page(document: Document) -> str:
    """The document as HTML. All of its text is escaped; only the drawings are markup, and they are our own."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    drawings = [
        [Markup(charts.svg(chart, f"chart-{i}-{j}")) for j, chart in enumerate(section.charts)]
        for i, section in enumerate(document.sections)
    ]
    return environment.get_template("page.html.j2").render(document=document, drawings=drawings)
