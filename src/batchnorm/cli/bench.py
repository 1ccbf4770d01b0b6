"""`batchnorm bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from batchnorm.cli.options import FILE
from batchnorm.errors import UsageError
from batchnorm.files import check_writable, writing


@click.command()
@click.option(
    "--suite",
    type=click.Choice(["resnet", "small", "odd", "all"]),
    default="all",
    show_default=True,
    help="Which shapes.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of the inputs; may be repeated. By default float32 and bfloat16, on a GPU all.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where.")
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write every number there.")
@click.option("--peers", is_flag=True, help="Measure JAX and TensorFlow too, from .peers (make peers).")
@click.option("--compile/--no-compile", default=True, help="Measure torch.compile too (compiling takes minutes).")
@click.option("--warm", is_flag=True, help="Write outputs to memory that was used before, instead of fresh pages.")
def bench(
    suite: str, dtypes: tuple[str, ...], device: str, json_file: Path | None, peers: bool, compile: bool, warm: bool
) -> None:
    """Measure BN + ReLU beside torch: in one run, interleaved, with the answers compared.

    On a GPU with a residual, too.
    """
    from rich.console import Console

    from batchnorm.bench import contenders, cuda, measure, suites, summary
    from batchnorm.report import text

    if device == "cuda":
        cuda.check()
        for option, given in (("--peers", peers), ("--warm", warm)):
            if given:
                raise UsageError(f"got {option} with --device cuda; {option} is for the CPU. Leave out one of them")
    if json_file is not None:
        check_writable(json_file)
    cases = suites.cases(
        suite, tuple(dict.fromkeys(dtypes)) or suites.USUAL[device], (False, True) if device == "cuda" else (False,)
    )
    gpu = None
    with text.progress(Console(stderr=True), "bench", len(cases) * len(contenders.PHASES)) as advance:
        if device == "cuda":
            rows, gpu = cuda.run(cases, compile=compile, advance=lambda _: advance(1))
        else:
            rows = measure.run(
                cases,
                peers=Path(".peers") if peers else None,
                compile=compile,
                warm=warm,
                advance=lambda _: advance(1),
            )
    if json_file is not None:
        with writing(json_file):
            measure.write_json(json_file, rows, warm=warm, gpu=None if gpu is None else cuda.described(gpu))
    # A file has no width: the table is then as wide as it needs to be.
    text.show(summary.section(rows, warm=warm, gpu=gpu), Console(width=None if sys.stdout.isatty() else 160))
