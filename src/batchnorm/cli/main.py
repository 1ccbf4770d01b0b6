"""Every command, and what is common to them: arguments in, one line for an error, an exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

import batchnorm
from batchnorm.cli import output
from batchnorm.cli.bench import bench
from batchnorm.cli.check import check
from batchnorm.cli.explain import explain
from batchnorm.cli.fold import fold
from batchnorm.cli.kernels import kernels
from batchnorm.cli.monitor import monitor
from batchnorm.cli.pool import pool
from batchnorm.cli.recalibrate import recalibrate
from batchnorm.cli.study import study
from batchnorm.errors import BatchNormError
from batchnorm.messages import described

_TRACEBACK = "BATCHNORM_TRACEBACK"  # a variable of the environment


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(batchnorm.__version__, prog_name="batchnorm", message="%(prog)s %(version)s")
@click.pass_context
def _commands(context: click.Context) -> None:
    """Batch normalization for PyTorch that you can trust."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


for _command in (check, explain, monitor, recalibrate, pool, fold, study, kernels, bench):
    _commands.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None for those of this process.

    Returns:
        The exit code: 0; 1 where `check` found what it is to fail on, and where the reader of our output went away; 2
        for wrong use, and for every other error; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    output.prepare()
    try:
        # Not click's own main(): it would print errors in several lines, and an empty one on Ctrl-C.
        with _commands.make_context("batchnorm", arguments) as context:
            _commands.invoke(context)
        _flush()
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.ClickException as error:
        return _failed(error.format_message())
    except BatchNormError as error:
        # The notes say which batch it was.
        return _failed("; ".join([described(error), *getattr(error, "__notes__", ())]))
    except KeyboardInterrupt:
        output.complain("interrupted")
        return 130
    except BrokenPipeError:
        output.give_up_stdout()
        return 1
    except OSError as error:
        reason = error.strerror or described(error)
        if error.filename is not None:
            return _failed(f"cannot use {error.filename}: {reason}")
        output.give_up_stdout()  # what has no name is stdout
        return _failed(f"cannot write the output: {reason}")
    except BaseException as error:
        if os.environ.get(_TRACEBACK):
            raise
        kind = type(error).__name__
        return _failed(
            f"{kind}: {described(error)}. batchnorm did not expect this; {_TRACEBACK}=1 shows where it comes from"
        )
    return 0


def _failed(message: str) -> int:
    """Complain, and return the exit code."""
    output.complain(message)
    try:
        _flush()
    except (OSError, ValueError):
        output.give_up_stdout()
    return 2


def _flush() -> None:
    """Write what stdout still holds, the user's own prints too, while an error can be told."""
    if sys.stdout is not None:
        sys.stdout.flush()
