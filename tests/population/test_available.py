"""What the system says about memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.errors import OptionError
from batchnorm.population import available
from batchnorm.population.available import default_limit

FREED = """
import torch
from batchnorm.population.available import hand_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = resident()
blocks = [torch.ones(2**15) for _ in range(1024)]  # below the size that gets pages of its own
last = torch.ones(100)
last_block = blocks.pop()
del blocks
kept = resident() - before
hand_back()
print(kept, resident() - before)
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n"}, 8000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "10\n",
                "sys/fs/cgroup/a/memory.max": "1000\n",
                "sys/fs/cgroup/a/memory.current": "300\n",
            },
            700,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n2:memory:/host/path\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "500\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "600\n",
            },
            0,
        ),
    ],
    ids=["machine", "no limit", "version 2, of a parent", "version 1, in a container, used up"],
)
def test_linux(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    root = write(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", **files})
    assert available.available(root) == expected


def test_other_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf_names", dict.fromkeys(values, 0))
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert available.available(tmp_path) == 409600
    monkeypatch.setattr(os, "sysconf_names", {})
    assert available.available(tmp_path) is None


def test_this_machine() -> None:
    free = available.available()
    assert free is not None
    assert 2**20 < free < 2**50


def test_half_of_it_shared_with_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "available", lambda: 1000)
    assert default_limit(torch.device("cpu")) == 500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_limit(torch.device("cpu")) == 250
    monkeypatch.setattr(available, "available", lambda: None)
    assert default_limit(torch.device("cpu")) is None
    for told in ("", "0", "-1", "two", "1e3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
        with pytest.raises(OptionError, match="got LOCAL_WORLD_SIZE"):
            default_limit(torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much is resident")
def test_freed_memory_goes_back() -> None:
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    kept, after = map(int, run.stdout.split())
    assert kept > 100 * 2**20  # the C library keeps what lies below something that is still in use
    assert after < 20 * 2**20
