"""Values of options: files, counts, numbers of bytes."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import click

LARGEST = 2**63 - 1  # what torch counts with
FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1, max=LARGEST)

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DIGITS = 30  # of a number; Python refuses to read thousands


def number_of_bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A number of bytes, such as 500000000, 500MB or 1.5GB, as a callback of an option.

    Raises:
        click.BadParameter: it is none, or too large to count with.
    """
    if value is None:
        return None
    match = re.fullmatch(rf"([0-9]{{1,{_DIGITS}}}(?:\.[0-9]{{1,{_DIGITS}}})?) ?([KMGT]?)B?", value.upper())
    number = None if match is None else int(Fraction(match[1]) * _FACTORS[match[2]])
    if number is None or number > LARGEST:
        raise click.BadParameter(f"got {value}; it must be a number of bytes below 2**63, such as 500MB or 1.5GB")
    return number
