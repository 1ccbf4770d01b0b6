"""`batchnorm study`."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from batchnorm.cli.main import main
from batchnorm.study import runner
from cli.commands import START, fails, start
from study.trials import trial

LEFT = ["figures", "report.html", "results.json", "tasks"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One experiment of a moment, in this process."""
    defaults = {**runner.study.__kwdefaults__, "experiments": (trial(),), "processes": 1}
    monkeypatch.setattr(runner.study, "__kwdefaults__", defaults)


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("--out DIR", "--quick", "--data DATA", "--layers [ours|torch]", "study-report", "batchnorm[study]"):
        assert part in text


@pytest.mark.parametrize("inside", ["", "deep"])
def test_out_is_a_file(inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    out = str(file / inside)
    assert f"cannot write to {out}: " in fails(capsys, "study", "--out", out)


def test_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    """In fresh processes, so that nothing has been imported before."""
    started = {
        module: start(
            "study", "--out", str(tmp_path / module), code=f"import sys; sys.modules['{module}'] = None; {START}"
        )
        for module in ("sklearn", "matplotlib", "jinja2")
    }
    for module, process in started.items():
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 2, module
        assert output == ""
        assert errors.count("\n") == 1
        assert errors.startswith("batchnorm: the study needs ")
        assert errors.endswith('pip install "batchnorm[study]"\n')
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_ctrl_c_during_a_study(tmp_path: Path) -> None:
    announce = "from batchnorm.study import dataset as data; read = data.digits; "
    announce += "data.digits = lambda: (print('reading', flush=True), read())[1]; "
    process = start("study", "--quick", "--out", str(tmp_path), code=announce + START)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("tasks/*/*.json")):  # until there is work to lose
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output == ""
    *progress, last = errors.splitlines()
    assert last == "batchnorm: interrupted"
    assert all(line.startswith("study: ") for line in progress)
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"], "what was done is kept"


def test_a_study(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report"
    assert main(["study", "--quick", "--layers", "torch", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert all(line.startswith("study: ") for line in captured.err.splitlines()), "what is done, and the time left"
    lines = captured.out.splitlines()
    assert lines[-1] == str(out / "report.html")
    assert Path(lines[-1]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["layers"] == "torch"
    (finding,) = results["experiments"]["trial"]["findings"]
    assert lines[:2] == ["| | statement | verdict | measured | margin |", "|---|---|---|---|---|"]
    (value,), margin = finding["quantity"]["values"], finding["margin"]
    assert lines[2].startswith(
        f"| {finding['mission']} | {finding['statement']} | {finding['verdict']} | mean: {value['estimate']:.2f} ("
    )
    assert f" | {margin['estimate']:.3g} ({margin['low']:.3g} to " in lines[2]
    assert len(lines) == 4


def test_the_default_place(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study"]) == 0
    assert sorted(path.name for path in Path("study-report").glob("[!.]*")) == LEFT


def test_wrong_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "mine.npz" in fails(capsys, "study", "--data", str(tmp_path / "mine.npz"), "--out", str(tmp_path))
