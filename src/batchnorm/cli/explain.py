"""`batchnorm explain`."""

from __future__ import annotations

import sys

import click

from batchnorm.cli.output import say
from batchnorm.errors import UsageError


@click.command()
@click.argument("code", metavar="[CODE]", required=False)
def explain(code: str | None) -> None:
    """Tell what a check finds, why it hurts, how it is measured, and what to do; without CODE, list all checks.

    CODE is one such as BN301, or a name such as inference-gap.
    """
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    from batchnorm.diagnosis.catalogue import CHECKS, explanation

    if code is not None:
        check = CHECKS.get(code.upper()) or next((c for c in CHECKS.values() if c.name == code.lower()), None)
        if check is None:
            raise UsageError(f"got {code}; there is no such check. `batchnorm explain` lists them")
        page = explanation(check)
        if sys.stdout.isatty():
            Console().print(Markdown(page))
        else:
            say(page.rstrip("\n"))
        return
    rows = [(c.code, c.name, f"{c.severity}{' *' if c.fixed else ''}", c.found) for c in CHECKS.values()]
    grid = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    # A file has no width: a line is then as long as it is.
    console = Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(grid)
    say("\n".join(line.rstrip() for line in capture.get().splitlines()))
    say("\n* --fix does it")
