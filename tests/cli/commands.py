"""What the tests of the command line have in common: a process of its own, and one line of complaint."""

from __future__ import annotations

import subprocess
import sys

import pytest

from batchnorm.cli.main import main

START = "from batchnorm.cli.main import main; raise SystemExit(main())"


# What a shell runs in the background ignores Ctrl-C, and so does what that starts.
_HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


def start(*arguments: str, code: str = START, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _HEED + code, *arguments]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, see one line of complaint and exit code 2, and return the line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("batchnorm: ")
    return captured.err
