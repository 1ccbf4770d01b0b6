"""`batchnorm monitor`."""

from __future__ import annotations

from pathlib import Path

import click

from batchnorm.cli.options import FILE
from batchnorm.cli.output import say
from batchnorm.diagnosis import curves
from batchnorm.extras import require
from batchnorm.files import check_writable, write_text
from batchnorm.messages import one_line
from batchnorm.models.norm_layers import display_name
from batchnorm.report.page import page


@click.command()
@click.argument("file", type=FILE, metavar="FILE")
@click.option(
    "--html", type=FILE, metavar="FILE", help="Where the page is written; by default FILE with .html for its suffix."
)
def monitor(file: Path, html: Path | None) -> None:
    """Draw what a monitor wrote: a page of curves for each layer, of the last training run in FILE.

    FILE is what batchnorm.Monitor was given as its writer. Prints each layer's last record.

    Needs the extra packages of: pip install "batchnorm[study]"
    """
    require("study", "the page", "matplotlib", "jinja2")
    records, others = curves.read(file)
    target = file.with_suffix(".html") if html is None else html
    check_writable(target)
    for layer, record in {record.layer: record for record in records}.items():
        say(f"{one_line(display_name(layer))}: {curves.summary(record)}")
    write_text(target, page(curves.document(records, str(file), others)))
    say(one_line(str(target)))
