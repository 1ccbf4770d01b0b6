"""`batchnorm pool`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import click

import batchnorm
from batchnorm.cli.options import FILE
from batchnorm.cli.output import say
from batchnorm.errors import UsageError
from batchnorm.loading.state_dict import (
    Weights,
    check_state_dict_path,
    read_state_dict,
    save_state_dict,
)
from batchnorm.messages import one_line

_NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")


@click.command()
@click.argument("files", metavar="FILE...", type=FILE, nargs=-1, required=True)
@click.option("--counts", required=True, metavar="N,N,...", help="How many samples each file's model has seen.")
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Where the weights are written.")
def pool(files: tuple[Path, ...], counts: str, output: Path) -> None:
    """Pool the running statistics of several FILEs of weights into one.

    Statistics become those of all the models' data together, the variance between them included; everything else is
    the first FILE's. stdout says what was pooled, and what did not match. FILE is .safetensors, or .pt or .pth as
    torch.save writes a state_dict.
    """
    numbers = _counts(counts, files)
    check_state_dict_path(output)
    states = [read_state_dict(path) for path in files]
    pooled = batchnorm.pool_statistics(states, numbers)
    save_state_dict(Weights(pooled.state_dict), output)
    unpooled = tuple(layer._replace(name=one_line(layer.name)) for layer in pooled.unpooled)
    say(str(replace(pooled, pooled=_fit(pooled.pooled), copied=_fit(pooled.copied), unpooled=unpooled)))


def _fit(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(one_line(name) for name in names)


def _counts(text: str, files: tuple[Path, ...]) -> list[float]:
    parts = text.split(",")
    if len(parts) != len(files) or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
        raise UsageError(
            f"got --counts {text} for {len(files)} files; it must be a number of samples for each, with commas between "
            f"them, such as 100,300"
        )
    return [float(part) for part in parts]
