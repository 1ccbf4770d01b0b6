"""Every row of docs/compatibility.md is true, and every row is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compatibility import table
from compatibility.rows import Row

ROWS = table.all_rows()
TIME_LIMIT = 600  # seconds; the slowest, torchao's search for patterns, takes two to three minutes on busy cores


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.tool)
def test_a_row_is_true(row: Row) -> None:
    # In a process of its own: tools change torch for everybody, and some start processes.
    command = [sys.executable, table.__file__, row.tool]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    assert run.returncode == 0, run.stderr
    assert f"true: {row}" in run.stdout


def test_the_document_has_every_row() -> None:
    assert table.table() in table.DOCUMENT.read_text()
    assert len({row.tool for row in ROWS}) == len(ROWS)
