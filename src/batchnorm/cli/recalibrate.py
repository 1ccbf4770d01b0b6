"""`batchnorm recalibrate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import batchnorm
from batchnorm.cli.options import COUNT, FILE, number_of_bytes
from batchnorm.cli.output import say
from batchnorm.cli.processes import processes
from batchnorm.errors import UsageError
from batchnorm.files import check_writable
from batchnorm.loading.data import load_data
from batchnorm.loading.model import load_model
from batchnorm.loading.object_reference import blaming
from batchnorm.loading.state_dict import check_state_dict, check_state_dict_path, save_state_dict
from batchnorm.messages import one_line
from batchnorm.population.batches import default_forward
from batchnorm.population.recalibrate import METHODS


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--data", required=True, metavar="DATA", help="The data to compute the statistics from.")
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Where the weights are written.")
@click.option("--weights", type=FILE, metavar="FILE", help="Weights to load into MODEL first.")
@click.option(
    "--method", type=click.Choice(list(METHODS)), default="exact", show_default=True, help="Which statistics."
)
@click.option("--batch-size", type=COUNT, metavar="N", help="Batch size of a .npz file; 32 by default.")
@click.option("--max-samples", type=COUNT, metavar="N", help="Use at most N samples in each process.")
@click.option(
    "--memory-limit",
    callback=number_of_bytes,
    metavar="BYTES",
    help='For suspended passes of "exact", such as 2GB; by default half of what is free.',
)
@click.option(
    "--checkpoint",
    type=FILE,
    metavar="FILE",
    help='Keep the progress of "pooled" there, so that a killed run can go on.',
)
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
    """Set the running statistics of MODEL's batch-norm layers to those of DATA.

    MODEL is package.module:callable or path/file.py:callable, and returns the model. DATA is such a callable that
    returns batches, or a .npz file with an array x. FILE is .safetensors, or .pt as torch.save writes a state_dict.

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
        _check_visible(net, model)
        check_state_dict(net, output)
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
            layers = [replace(layer, name=one_line(layer.name)) for layer in result.layers]
            skipped = [layer._replace(name=one_line(layer.name)) for layer in result.skipped]
            say(str(replace(result, layers=tuple(layers), skipped=tuple(skipped))))


def _check_visible(net: nn.Module, reference: str) -> None:
    """Layers inside TorchScript run without calling Python: nothing would be recalibrated there, silently."""
    for name, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and (not name or "running_mean" in dict(module.named_buffers())):
            where = f"whose module {name} is" if name else "which is"
            raise UsageError(
                f"got MODEL {reference}, {where} TorchScript; its layers cannot be seen. Return the model as it was "
                f"before torch.jit, and recalibrate that"
            )
