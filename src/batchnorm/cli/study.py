"""`batchnorm study`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("study-report"),
    show_default=True,
    metavar="DIR",
    help="Where results.json and report.html are written.",
)
@click.option("--quick", is_flag=True, help="Three seeds instead of ten.")
def study(out: Path, quick: bool) -> None:
    """Train with and without batch normalization, and report the difference.

    Needs the extra packages of: pip install "batchnorm[study]"
    """
    from rich.console import Console

    from batchnorm.report import text
    from batchnorm.study import experiments

    outcome = experiments.study(out, quick=quick, console=Console(stderr=True))
    for section in outcome.sections:
        text.show(section, Console())
    click.echo(outcome.page)
