"""The table of docs/compatibility.md.

python tests/compatibility/table.py          prints it
python tests/compatibility/table.py TOOL     tries one row
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # As pytest finds modules.
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "benchmarks")]

from compatibility.rows import ROWS, Row
from support.tools import make_importable

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
# In the order of the table.
GROUPS = ("graphs", "quantization", "state", "rebuilding", "distributed", "parallel", "trainers")


def all_rows() -> list[Row]:
    """The rows of all groups; importing a group adds them. Groups import tools inside their checks."""
    for group in GROUPS:
        importlib.import_module(f"compatibility.{group}")
    return ROWS


def table() -> str:
    """The table in Markdown."""
    head = "| tool | tried with | as it is | what comes first |\n|---|---|---|---|\n"
    return head + "".join(f"{row}\n" for row in all_rows())


if __name__ == "__main__":
    if tools := sys.argv[1:]:
        make_importable()
        for row in all_rows():
            if row.tool in tools:
                row.check()
                print(f"true: {row}")
    else:
        print(table(), end="")
