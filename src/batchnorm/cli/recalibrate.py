"""`batchnorm recalibrate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import batchnorm
from batchnorm.cli.processes import processes
from batchnorm.loading.data import load_data
from batchnorm.loading.model import load_model
from batchnorm.loading.object_reference import blaming
from batchnorm.loading.state_dict import check_state_dict_path, check_writable, save_state_dict
from batchnorm.population.batches import default_forward
from batchnorm.population.recalibrate import METHODS

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_FILE = click.Path(path_type=Path)


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A number of bytes, such as 500000000, 500MB or 1.5GB."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", value.upper())
    if match is None:
        raise click.BadParameter(f"got {value}; it must be a number of bytes, such as 500MB or 1.5GB")
    return int(float(match[1]) * _FACTORS[match[2]])


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--data", required=True, metavar="DATA", help="The data that the statistics are to be of.")
@click.option("--output", type=_FILE, required=True, metavar="FILE", help="Where the weights are written.")
@click.option("--weights", type=_FILE, metavar="FILE", help="Weights to begin with, instead of MODEL's own.")
@click.option(
    "--method", type=click.Choice(list(METHODS)), default="exact", show_default=True, help="Which statistics."
)
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Of a .npz file; 32 by default.")
@click.option("--max-samples", type=click.IntRange(min=1), metavar="N", help="Use so many at most, in each process.")
@click.option("--memory-limit", callback=_bytes, metavar="BYTES", help='Of "exact": 2GB, say; half of what is free.')
@click.option("--checkpoint", type=_FILE, metavar="FILE", help='Of "pooled": progress, so that a killed run goes on.')
def recalibrate(
    model: str,
    data: str,
    output: Path,
    weights: Path | None,
    method: str,
    batch_size: int | None,
    max_samples: int | None,
    memory_limit: int | None,
    checkpoint: Path | None,
) -> None:
    r"""Set the running statistics of MODEL's batch-norm layers to those of DATA.

    MODEL is package.module:callable or path/file.py:callable, and returns the model. DATA is such a callable that
    returns batches, or a .npz file with an array x. FILE is .safetensors, or .pt as torch.save writes a state_dict.

    \b
    With many processes: torchrun --nproc-per-node 2 -m batchnorm recalibrate ...
    """
    from rich.console import Console

    from batchnorm.report import text

    def forward(net: nn.Module, batch: Any) -> None:  # noqa: ANN401 - batches are of any type
        with blaming("the model"):
            default_forward(net, batch)

    check_state_dict_path(output)
    if checkpoint is not None:
        check_writable(checkpoint)
    with processes() as group:
        torch.manual_seed(0)  # shuffled data must come in the same order in every process
        net = load_model(model, weights)
        batches = load_data(data, batch_size=batch_size, rank=group.rank, size=group.size)
        first = group.rank == 0
        with text.following(Console(stderr=True, quiet=not first), method) as follow:
            result = batchnorm.recalibrate(
                net,
                batches,
                method=method,
                forward=forward,
                max_samples=max_samples,
                memory_limit=memory_limit,
                progress=follow,
                checkpoint=checkpoint,
            )
        if first:
            save_state_dict(net, output)
            click.echo(str(result))
