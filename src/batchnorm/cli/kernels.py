"""`batchnorm kernels`."""

from __future__ import annotations

import click

import batchnorm
from batchnorm.cli.output import say


@click.command()
def kernels() -> None:
    """Show which implementation serves which device and dtype."""
    say(str(batchnorm.kernels()))
