"""What commands print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.cli import output

TEXT = "é 漢 \N{MINUS SIGN}1 \x1b[2J \u202e \udcff"


def test_names_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    output.prepare()
    output.say(TEXT)
    assert capsys.readouterr().out == "é 漢 \N{MINUS SIGN}1 \\x1b[2J \\u202e \\udcff\n"
    output.complain(f"two\nlines {TEXT}")
    assert capsys.readouterr().err == "batchnorm: two lines é 漢 \N{MINUS SIGN}1 \\x1b[2J \\u202e \\udcff\n"


PRINT = """
import sys
from batchnorm.cli import output
output.prepare()
output.say("\\u00e9 \\u6f22 1")
output.complain("\\u00e9 \\u6f22 2")
"""


def test_a_terminal_that_lacks_a_character() -> None:
    encoding, first = "latin-1", b"\xe9 "
    run = subprocess.run(
        [sys.executable, "-c", PRINT], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True
    )
    assert run.stdout == first + rb"\u6f22 1" + b"\n"
    assert run.stderr == b"batchnorm: " + first + rb"\u6f22 2" + b"\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_stderr_that_takes_nothing_is_no_error() -> None:
    code = "from batchnorm.cli import output; output.complain('x'); print('on')"
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert run.stdout == "on\n"
