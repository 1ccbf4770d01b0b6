"""`batchnorm kernels`."""

from __future__ import annotations

import click

import batchnorm


@click.command()
def kernels() -> None:
    """Show which implementation serves which device and dtype."""
    click.echo(str(batchnorm.kernels()))
