"""Every command: what is printed where, and the exit codes."""

from __future__ import annotations

import os
import sys

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


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(batchnorm, "kernels", broken)
    with pytest.raises(ZeroDivisionError):
        main(["kernels"])


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
