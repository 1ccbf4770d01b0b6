"""Values of options."""

from __future__ import annotations

import click
import pytest

from batchnorm.cli.options import LARGEST, number_of_bytes


def read(text: str | None) -> int | None:
    command = click.Command("c")
    return number_of_bytes(click.Context(command), click.Option(["--memory-limit"]), text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (None, None),
        ("0", 0),
        ("1.5GB", 1_500_000_000),
        ("2kb", 2000),
        ("9007199254740993", 9007199254740993),  # not a float
        (str(LARGEST), LARGEST),
        ("9.2 M", 9_200_000),
    ],
)
def test_numbers_of_bytes(text: str | None, number: int | None) -> None:
    assert read(text) == number


@pytest.mark.parametrize(
    "text", ["9" * 400, "9" * 5000, str(LARGEST + 1), "1e9", "-1", "1.5XB", "٣MB", "", "nan", "GB"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"it must be a number of bytes below 2\*\*63"):
        read(text)
