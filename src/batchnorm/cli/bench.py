"""`batchnorm bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from batchnorm.cli.options import FILE
from batchnorm.files import check_writable, writing


@click.command()
@click.option(
    "--suite",
    type=click.Choice(["resnet", "small", "odd", "all"]),
    default="all",
    show_default=True,
    help="Which shapes.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the inputs; both by default.")
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write every number there.")
@click.option("--peers", is_flag=True, help="Measure JAX and TensorFlow too, from .peers (make peers).")
@click.option("--compile/--no-compile", default=True, help="Measure torch.compile too (compiling takes minutes).")
@click.option("--warm", is_flag=True, help="Outputs in memory that was used before, instead of fresh.")
def bench(suite: str, dtype: str | None, json_file: Path | None, peers: bool, compile: bool, warm: bool) -> None:
    """Measure BN + ReLU beside torch: in one run, interleaved, with the answers compared."""
    from rich.console import Console

    from batchnorm.bench import contenders, measure, suites, summary
    from batchnorm.report import text

    if json_file is not None:
        check_writable(json_file)
    cases = suites.cases(suite, tuple(suites.DTYPES) if dtype is None else (dtype,))
    with text.progress(Console(stderr=True), "bench", len(cases) * len(contenders.PHASES)) as advance:
        rows = measure.run(
            cases,
            peers=Path(".peers") if peers else None,
            compile=compile,
            warm=warm,
            advance=lambda _: advance(1),
        )
    if json_file is not None:
        with writing(json_file):
            measure.write_json(json_file, rows, warm=warm)
    # A file has no width: the table is then as wide as it needs to be.
    text.show(summary.section(rows, warm=warm), Console(width=None if sys.stdout.isatty() else 160))
