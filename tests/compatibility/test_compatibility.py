"""Every row of docs/compatibility.md is true, and every row is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from compatibility import table
from compatibility.rows import Row

ROWS = table.all_rows()
TIME_LIMIT = 600  # seconds; the slowest, torchao's search for patterns, takes two to three minutes on busy cores

Run = subprocess.CompletedProcess[str]


def run(row: Row) -> Run:
    """A row in a process of its own: tools change torch for everybody, and some start processes."""
    command = [sys.executable, table.__file__, row.tool]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Run]]]:
    """Those of all rows that are asked for, as many at once as there are cores: most of the time they import."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {row.tool: pool.submit(run, row) for item in items for row in [item.callspec.params["row"]]}
    pool.shutdown(cancel_futures=True)


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.tool)
def test_a_row_is_true(row: Row, runs: dict[str, Future[Run]]) -> None:
    done = runs[row.tool].result()
    assert done.returncode == 0, done.stderr
    assert f"true: {row}" in done.stdout


@pytest.mark.long
def test_the_document_has_every_row() -> None:
    assert table.table() in table.DOCUMENT.read_text()
    assert len({row.tool for row in ROWS}) == len(ROWS)
