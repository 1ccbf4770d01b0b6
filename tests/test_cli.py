"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import batchnorm
from batchnorm.bench import measure, suites
from batchnorm.cli import main
from batchnorm.errors import ShapeError
from batchnorm.study import experiments
from batchnorm.study.speed import Plan

TINY = Plan(seeds=1, steps=4, evaluate_every=2, hidden=(16,))
START = "from batchnorm.cli import main; raise SystemExit(main())"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments of a second."""
    rows = tuple(replace(row, full=TINY, quick=TINY) for row in experiments.EXPERIMENTS)
    monkeypatch.setattr(experiments.study, "__kwdefaults__", {"experiments": rows})


def start(*arguments: str, code: str = START, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, see one line of complaint and exit code 2, and return the line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("batchnorm: ")
    return captured.err


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


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("--out DIR", "--quick", "study-report", "batchnorm[study]"):
        assert part in text


def test_no_command_is_help_and_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: batchnorm ")


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels"]) == 0
    assert capsys.readouterr().out == f"{batchnorm.kernels()}\n"


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


@pytest.mark.parametrize("inside", ["", "deep"])
def test_out_is_a_file(inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    out = str(file / inside)
    assert f"cannot write to {out}: " in fails(capsys, "study", "--out", out)


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "jinja2"])
def test_a_missing_extra_is_one_line(module: str, tmp_path: Path) -> None:
    """In a fresh process, so that nothing has been imported before."""
    process = start(
        "study", "--out", str(tmp_path / "out"), code=f"import sys; sys.modules['{module}'] = None; {START}"
    )
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("batchnorm: the study needs ")
    assert errors.endswith('pip install "batchnorm[study]"\n')
    assert not (tmp_path / "out").exists()


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


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_ctrl_c_during_a_study(tmp_path: Path) -> None:
    announce = "from batchnorm.study import speed; run = speed.digits; "
    announce += "speed.digits = lambda: (print('training', flush=True), run())[1]; "
    process = start("study", "--out", str(tmp_path), code=announce + START)
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output == ""
    assert errors == "batchnorm: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="broken pipes are POSIX's")
def test_a_broken_pipe_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("kernels", stdout=writer)
    os.close(writer)
    _, errors = process.communicate(timeout=120)
    assert errors == ""
    assert process.returncode == 1


def test_a_study(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--quick", "--out", str(tmp_path / "new" / "report")]) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "no progress bar where there is no terminal"
    lines = captured.out.splitlines()
    assert lines[-1] == str(tmp_path / "new" / "report" / "report.html")
    assert Path(lines[-1]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    results = json.loads((tmp_path / "new" / "report" / "results.json").read_text(encoding="utf-8"))
    for cell in results["experiments"]["speed"]["cells"]:
        row = next(
            line.split() for line in lines if line.startswith(cell["network"]) and f" {cell['learning_rate']} " in line
        )
        assert f"{100 * cell['accuracy_mean']:.1f}" in row


def test_a_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = suites.Case("small", (8, 3), suites.FIRST, "float32")
    monkeypatch.setattr(suites, "cases", lambda suite: [case])
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    path = tmp_path / "bench.json"
    assert main(["bench", "--suite", "small", "--no-compile", "--json", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for row in json.loads(path.read_text())["rows"]:
        assert f"{1e3 * row['seconds']['ours']:.3f}" in captured.out  # whole numbers, whatever the width
    assert "geometric mean" in captured.out


def test_a_bench_without_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "make peers" in fails(capsys, "bench", "--peers", "--no-compile")
    assert "'nothing' is not one of" in fails(capsys, "bench", "--suite", "nothing")


def test_the_default_place(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study"]) == 0
    assert sorted(path.name for path in (tmp_path / "study-report").iterdir()) == ["report.html", "results.json"]


def test_importing_the_package_imports_none_of_the_commands_packages() -> None:
    names = {"rich", "click", "jinja2", "matplotlib", "sklearn"}
    code = f"import sys, torch; before = set(sys.modules); import batchnorm; print({names} & set(sys.modules) - before)"
    process = start(code=code)
    output, _ = process.communicate(timeout=120)
    assert output == "set()\n"


@pytest.mark.long
def test_the_quick_study(tmp_path: Path) -> None:
    process = start("study", "--quick", "--out", str(tmp_path))
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, "")
    assert output.splitlines()[-1] == str(tmp_path / "report.html")
    speed = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["experiments"]["speed"]
    assert speed["plan"]["seeds"] == 3
    assert speed["plan"]["learning_rates"] == [0.1, 0.5]
    cells = {(cell["network"], cell["learning_rate"]): cell for cell in speed["cells"]}
    moderate, large = speed["plan"]["learning_rates"]
    # The article's two claims, and that inference needs no batch.
    assert cells["batch norm", moderate]["median_steps"] < cells["plain", moderate]["median_steps"]
    assert cells["batch norm", large]["reached"] == 3
    assert cells["plain", large]["reached"] == 0
    for run in speed["runs"]:
        assert run["different"] <= 1, "one at a time and in batches differ by rounding alone"
