"""Every command, and what is common to them: arguments in, one line for an error, an exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

import batchnorm
from batchnorm.cli.bench import bench
from batchnorm.cli.fold import fold
from batchnorm.cli.kernels import kernels
from batchnorm.cli.recalibrate import recalibrate
from batchnorm.cli.study import study
from batchnorm.errors import BatchNormError


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(batchnorm.__version__, prog_name="batchnorm", message="%(prog)s %(version)s")
@click.pass_context
def _commands(context: click.Context) -> None:
    """Batch normalization for PyTorch that you can trust."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


for _command in (recalibrate, fold, study, kernels, bench):
    _commands.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None for those of this process.

    Returns:
        The exit code: 0; 2 for wrong use; 130 after Ctrl-C; 1 where the reader of our output went away.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Not click's own main(): it would print errors in several lines, and an empty one on Ctrl-C.
        with _commands.make_context("batchnorm", arguments) as context:
            _commands.invoke(context)
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.ClickException as error:
        return _complain(error.format_message(), 2)
    except BatchNormError as error:
        # The notes say which batch it was.
        return _complain("; ".join([str(error), *getattr(error, "__notes__", ())]), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _complain(message: str, code: int) -> int:
    click.echo(f"batchnorm: {' '.join(message.split())}", err=True)
    return code
