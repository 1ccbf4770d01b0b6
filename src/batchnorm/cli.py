"""The command line: parse, call, print, exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

import batchnorm
from batchnorm.errors import BatchNormError


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(batchnorm.__version__, prog_name="batchnorm", message="%(prog)s %(version)s")
@click.pass_context
def _commands(context: click.Context) -> None:
    """Batch normalization for PyTorch that you can trust."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


@_commands.command()
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


@_commands.command()
def kernels() -> None:
    """Show which implementation serves which device and dtype."""
    click.echo(str(batchnorm.kernels()))


@_commands.command()
@click.option(
    "--suite",
    type=click.Choice(["resnet", "small", "odd", "all"]),
    default="all",
    show_default=True,
    help="Which shapes.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write every number there.")
@click.option("--peers", is_flag=True, help="Measure JAX and TensorFlow too, from .peers (make peers).")
@click.option("--compile/--no-compile", default=True, help="Measure torch.compile too (compiling takes minutes).")
@click.option("--warm", is_flag=True, help="Outputs in memory that was used before, instead of fresh.")
def bench(suite: str, json_file: Path | None, peers: bool, compile: bool, warm: bool) -> None:
    """Measure BN + ReLU beside torch: in one run, interleaved, with the answers compared."""
    from rich.console import Console

    from batchnorm.bench import measure, rivals, suites, summary
    from batchnorm.report import text

    cases = suites.cases(suite)
    with text.progress(Console(stderr=True), "bench", len(cases) * len(rivals.PHASES)) as advance:
        rows = measure.run(
            cases,
            peers=Path(".peers") if peers else None,
            compile=compile,
            warm=warm,
            advance=lambda _: advance(1),
        )
    # A file has no width: the table is then as wide as it needs to be.
    text.show(summary.section(rows, warm=warm), Console(width=None if sys.stdout.isatty() else 160))
    if json_file is not None:
        measure.write_json(json_file, rows, warm=warm)


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
        return _complain(str(error), 2)
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
