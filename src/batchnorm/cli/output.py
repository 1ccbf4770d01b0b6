"""What commands print: names of others in it are shown, whatever is in them, and no terminal is too narrow-minded."""

from __future__ import annotations

import contextlib
import os
import sys

import click

from batchnorm.messages import one_line, printable


def prepare() -> None:
    """Have characters that the terminal's encoding lacks printed as escapes, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # what replaces them may be anything
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print to stdout."""
    click.echo(printable(text))


def complain(message: str) -> None:
    """Print one line to stderr, if that is possible: there is nowhere else to say that it is not."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"batchnorm: {one_line(message)}", err=True)


def give_up_stdout() -> None:
    """Python flushes stdout once more when it ends; where that failed, it must not fail again."""
    with contextlib.suppress(OSError, ValueError):  # it may be no file at all
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
