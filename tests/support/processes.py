"""Several processes in one group: what starts them, and what each of them does with its command line.

A script of scenarios is run by `run`, and calls `main`:

    python SCRIPT SCENARIO,... RANK SIZE FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# For collectives of the group: a process that is gone or elsewhere is an error after this.
GROUP_TIMEOUT = timedelta(seconds=20)
TESTS = Path(__file__).parents[1]
MODULES = (str(TESTS), str(TESTS.with_name("benchmarks")))  # where pytest finds modules: see pyproject.toml

Scenario = Callable[[int, int], dict[str, Any]]  # from rank and size of the group to what the process found


def run(
    scenarios: Iterable[str], size: int, folder: Path, timeout: float, *, script: str, **variables: str
) -> list[dict[str, Any] | None]:
    """Start the processes of a group, and wait for them.

    Args:
        scenarios: the names of those to run, in this order.
        size: how many processes.
        folder: an empty one, where they meet and leave what they found.
        timeout: in seconds, for all of it.
        script: path of a script that calls `main`.
        variables: for the environment.

    Returns:
        What each found, by scenario; None for one that did not come to its end.
    """
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, [*MODULES, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    commands = [
        [sys.executable, script, ",".join(scenarios), str(rank), str(size), str(folder)] for rank in range(size)
    ]
    started = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=folder)
        for command in commands
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    files = [folder / f"found{rank}" for rank in range(size)]
    assert any(file.exists() for file in files), "\n".join(errors)
    return [torch.load(file) if file.exists() else None for file in files]


def main(known: Mapping[str, Scenario]) -> None:
    """Join the group, run the scenarios that the command line names, and save what was found."""
    names, rank, size, folder = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
    torch.save({name: known[name](rank, size) for name in names}, folder / f"found{rank}")
    if names != ["killed"]:
        dist.destroy_process_group()
