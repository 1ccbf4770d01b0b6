"""A budget of memory, seen from outside: what a process really holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

WAYS = {"spill": lambda *_: True, "replay": lambda *_: False, "in turn": None}


PEAK = """
import json, sys
import torch
from torch import nn
import batchnorm as bn
from batchnorm.population import memory

torch.set_num_threads(1)
way, limit = sys.argv[1], int(sys.argv[2])
memory.spilling_is_cheaper = lambda *_: way == "spill"
model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
def batches(n):
    return (torch.randn(4, 1, 256, 256, generator=torch.Generator().manual_seed(i)) for i in range(n))
bn.recalibrate(model, batches(2), memory_limit=0)  # whatever is loaded once
def resident():
    return {line.split()[0]: int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "kB" in line}
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
before = resident()["VmRSS:"]
used = bn.recalibrate(model, batches(40), memory_limit=limit).memory
print(json.dumps([resident()["VmHWM:"] - before, used.peak, used.spilled, used.replays]))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own count of resident memory")
@pytest.mark.parametrize("way", ["spill", "replay"])
def test_the_memory_is_really_free(way: str) -> None:
    """40 passes hold 8 MB each; a tenth of that is allowed, and the process grows by less than half as much."""
    measured: dict[int, list[int]] = {}
    held = 40 * 8 * 2**20
    for limit in (2**40, held // 10):
        run = subprocess.run(
            [sys.executable, "-c", PEAK, way, str(limit)], capture_output=True, text=True, timeout=120, check=False
        )
        assert run.returncode == 0, run.stderr
        measured[limit] = json.loads(run.stdout)
    grown, peak, spilled, replays = measured[2**40]
    assert (peak, spilled, replays) == (held, 0, 0)
    assert grown > held
    grown_within, peak, spilled, replays = measured[held // 10]
    assert peak <= held // 10
    assert bool(spilled) == (way == "spill")
    assert replays == 1 if way == "spill" else replays > 1  # the first that found no room, and all others
    assert grown_within < grown / 2, measured
