"""`batchnorm study`."""

from __future__ import annotations

from pathlib import Path

import click

from batchnorm.cli.output import say


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("study-report"),
    show_default=True,
    metavar="DIR",
    help="Where report.html, results.json and figures are written, and where an interrupted run goes on.",
)
@click.option(
    "--quick", is_flag=True, help="Fewer seeds, smaller networks, no experiment that takes long: about a minute."
)
@click.option(
    "--data",
    metavar="DATA",
    help="A .npz file with x and y, or a callable that returns (x, y); by default scikit-learn's digits.",
)
@click.option(
    "--layers",
    type=click.Choice(["ours", "torch"]),
    default="ours",
    show_default=True,
    help="Which batch-norm layers are examined.",
)
def study(out: Path, quick: bool, data: str | None, layers: str) -> None:
    """Examine an article's statements on batch normalization by experiments, and report the verdicts.

    Needs the extra packages of: pip install "batchnorm[study]"
    """
    from rich.console import Console

    from batchnorm.study import runner

    outcome = runner.study(out, console=Console(stderr=True), quick=quick, data=data, layers=layers)
    # A table in Markdown, which reads well enough as it is.
    say("| | statement | verdict | measured | margin |\n|---|---|---|---|---|")
    for finding in outcome.findings:
        claim = finding.claim
        verdict = finding.verdict.value
        say(f"| {claim.mission} | {claim.statement} | {verdict} | {finding.quantity} | {finding.margin} |")
    say(str(outcome.page))
