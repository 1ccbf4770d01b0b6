"""`batchnorm fold`."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

import batchnorm
from batchnorm.cli.options import FILE
from batchnorm.cli.output import say
from batchnorm.errors import UsageError
from batchnorm.loading.data import load_data
from batchnorm.loading.model import load_model
from batchnorm.loading.object_reference import blaming
from batchnorm.loading.program import check_program_path, save_program
from batchnorm.messages import described, one_line
from batchnorm.population.available import available
from batchnorm.population.batches import samples

_SHAPE = re.compile(r"[0-9]+([,x][0-9]+)*")


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Where the folded model is written.")
@click.option("--example", required=True, metavar="SHAPE|DATA", help="An input's shape, such as 2,3,224,224; or data.")
@click.option("--weights", type=FILE, metavar="FILE", help="Weights to load into MODEL first.")
def fold(model: str, output: Path, example: str, weights: Path | None) -> None:
    """Fold MODEL's batch-norm layers into the linear layers beside them, for inference.

    MODEL is package.module:callable or path/file.py:callable, and returns the model. Each fold is checked on the
    example: standard normal values of that shape, or the first batch of DATA, such a callable or a .npz file.

    FILE ends with .pt2 (a program of torch.export, which runs without MODEL's code), .onnx, or .safetensors or .pt
    (the weights of the folded model).
    """
    check_program_path(output)
    net = load_model(model, weights)
    inputs = _example(example)
    with blaming("the model"):
        folded: Any = batchnorm.fold(net, inputs)
    save_program(folded, inputs, output)
    entries = [replace(entry, layer=one_line(entry.layer), what=one_line(entry.what)) for entry in folded.report]
    say(str(replace(folded.report, entries=tuple(entries))))


def _example(text: str) -> Any:  # noqa: ANN401 - what the model takes
    """A tensor of a shape, or what the first batch of DATA gives the model."""
    if _SHAPE.fullmatch(text):
        return _values(text)
    batch = next(iter(load_data(text)), None)
    if batch is None or samples(batch) in (None, 0):
        raise UsageError(
            f"got --example {text}, whose first batch has no samples; it must be a shape such as 2,3,224,224, or data"
        )
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _values(text: str) -> torch.Tensor:
    """Standard normal values of a shape, which has to fit the memory: a system may give more, and kill who uses it."""
    sizes = re.split("[,x]", text)
    shape = [int(size) for size in sizes if len(size) < 19]
    needed, there = math.prod(shape) * torch.get_default_dtype().itemsize, available()
    if len(shape) < len(sizes) or (there is not None and needed > there):
        raise UsageError(f"got --example {text}, and there is not enough memory for it. Give a smaller shape")
    try:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, MemoryError) as error:
        raise UsageError(f"got --example {text}, from which no tensor can be made: {described(error)}") from error
