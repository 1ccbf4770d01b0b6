"""The rows of the table in docs/compatibility.md: what each claims, and the test that makes it true."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from support.tools import version


class Row(NamedTuple):
    """A tool of others, tried on our layers.

    Attributes:
        tool: what its users call it.
        package: the distribution that it comes with; its version is the table's.
        works: what our layers do under it without more ado.
        first: for what a call comes first, and which; empty for nothing.
        check: raises where the row is not true.
    """

    tool: str
    package: str
    works: str
    first: str
    check: Callable[[], None]

    def __str__(self) -> str:
        tried = version(self.package).partition("+")[0]  # without "+cpu"
        return f"| {self.tool} | {self.package} {tried} | {self.works} | {self.first} |"


ROWS: list[Row] = []


def row(tool: str, package: str, works: str, first: str = "") -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Add what is decorated to the table as the check of a row."""

    def add(check: Callable[[], None]) -> Callable[[], None]:
        ROWS.append(Row(tool, package, works, first, check))
        return check

    return add
