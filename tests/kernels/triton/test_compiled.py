"""What every kernel compiles to for devices that are not here: no spills, few registers, and wide loads and stores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiled.py")
MOST_REGISTERS = 192  # of 255: with 128 threads to a program, two fit a multiprocessor at least


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_no_spills_and_wide_loads(architecture: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), architecture]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    rows = [line.split() for line in run.stdout.splitlines()]
    assert len(rows) == 2 * (4 + 6 + 2 + 2)
    for *_, kernel, registers, spills, loads, stores in rows:
        assert int(spills) == 0, (kernel, spills)
        assert int(registers) <= MOST_REGISTERS, (kernel, registers)
        assert int(loads) > 0, kernel
        if kernel in ("normalize_kernel", "input_kernel", "whole_forward_kernel", "whole_backward_kernel"):
            assert int(stores) > 0, kernel
