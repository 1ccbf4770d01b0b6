"""Every command: what is printed where, and the exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import batchnorm
from batchnorm.cli.main import main
from batchnorm.errors import ShapeError
from cli.commands import fails, start


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"batchnorm {batchnorm.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for command in ("study", "kernels", "bench"):
        assert f"\n  {command} " in captured.out


def test_no_command_is_help_and_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: batchnorm ")


def test_the_arguments_are_those_of_the_process_unless_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "--version"])
    assert main() == 0
    assert "batchnorm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["studdy"], "studdy"),
        (["--fast"], "--fast"),
        (["study", "--fast"], "--fast"),
        (["study", "somewhere"], "somewhere"),
        (["study", "--out"], "--out"),
        (["kernels", "cuda"], "cuda"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in fails(capsys, *arguments)


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise ShapeError("got this,\n   the rule is that")

    monkeypatch.setattr(batchnorm, "kernels", broken)
    assert fails(capsys, "kernels") == "batchnorm: got this, the rule is that\n"


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ArithmeticError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ZeroDivisionError("so many"), "ZeroDivisionError: so many. batchnorm did not expect this"),
        (SystemExit(0), "SystemExit: 0. "),
        (UnprintableError(), "UnprintableError: its message cannot be printed"),
        (
            RuntimeError("batchnorm::forward() API call failed at tensors.hpp, line 88"),
            "batchnorm::forward() API call failed. ",
        ),
        (
            RuntimeError("wrong\nException raised from f at /build/x.cpp:3 (most recent call first):\nframe #0: a"),
            ": wrong. ",
        ),
        (OSError(28, "No space left on device"), "cannot write the output: No space left on device\n"),
        (OSError(36, "File name too long", "nn"), "cannot use nn: File name too long\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_nobody_expected_is_one_line_too(
    error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(batchnorm, "kernels", broken)
    monkeypatch.setattr("batchnorm.cli.output.give_up_stdout", lambda: None)
    complaint = fails(capsys, "kernels")
    assert line in complaint
    assert "pp" not in complaint.replace("happen", "")


def test_a_bug_keeps_its_traceback_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(batchnorm, "kernels", broken)
    monkeypatch.setenv("BATCHNORM_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["kernels"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["kernels"], ["--help"], ["--version"], ["fold", "--help"]])
def test_a_full_stdout_is_one_line(arguments: list[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    process = start(*arguments, stdout=full)
    os.close(full)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (2, "batchnorm: cannot write the output: No space left on device\n")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batchnorm, "kernels", interrupted)
    assert main(["kernels"]) == 130
    assert capsys.readouterr().err == "batchnorm: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="broken pipes are POSIX's")
def test_a_broken_pipe_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("kernels", stdout=writer)
    os.close(writer)
    _, errors = process.communicate(timeout=120)
    assert errors == ""
    assert process.returncode == 1


def test_importing_the_package_imports_none_of_the_commands_packages() -> None:
    names = {"rich", "click", "jinja2", "matplotlib", "sklearn"}
    code = f"import sys, torch; before = set(sys.modules); import batchnorm; print({names} & set(sys.modules) - before)"
    process = start(code=code)
    output, _ = process.communicate(timeout=120)
    assert output == "set()\n"
