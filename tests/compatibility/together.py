"""Rows of tools that are about several processes: their checks run in two, in one group of gloo."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist

from support import processes

TIME_LIMIT = 150  # seconds, for both: most of them go by while two processes import torch
CHECKS: dict[str, processes.Scenario] = {}


def agreed(value: object) -> list[Any]:
    """What each process has."""
    values: list[Any] = [None, None]
    dist.all_gather_object(values, value)
    return values


def in_two_processes(check: Callable[[int], None]) -> Callable[[], None]:
    """Make what one process of a group of two does, given its rank, the check of a row."""

    def in_one(rank: int, size: int) -> dict[str, Any]:
        try:
            check(rank)
        except Exception:
            return {"error": traceback.format_exc()}
        return {"error": ""}

    def in_both() -> None:
        with TemporaryDirectory() as folder:
            found = processes.run([check.__name__], 2, Path(folder), TIME_LIMIT, script=__file__)
        errors = ["did not come to its end" if one is None else one[check.__name__]["error"] for one in found]
        assert not any(errors), "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors))

    assert check.__name__ not in CHECKS, f"two checks are called {check.__name__}"
    CHECKS[check.__name__] = in_one
    return in_both


if __name__ == "__main__":
    from compatibility import table, together

    table.all_rows()
    processes.main(together.CHECKS)
