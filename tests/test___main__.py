"""`python -m batchnorm`."""

from __future__ import annotations

import subprocess
import sys

import batchnorm


def test_it_is_the_command_line() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "batchnorm", "--version"], capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stdout == f"batchnorm {batchnorm.__version__}\n"


def test_its_exit_code_is_the_commands() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "batchnorm", "nothing"], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
