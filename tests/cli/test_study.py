"""`batchnorm study`."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from batchnorm.cli.main import main
from batchnorm.study import experiments
from batchnorm.study.speed import Plan
from commands import START, fails, start

TINY = Plan(seeds=1, steps=4, evaluate_every=2, hidden=(16,))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments of a second."""
    rows = tuple(replace(row, full=TINY, quick=TINY) for row in experiments.EXPERIMENTS)
    monkeypatch.setattr(experiments.study, "__kwdefaults__", {"experiments": rows})


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("--out DIR", "--quick", "study-report", "batchnorm[study]"):
        assert part in text


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


def test_the_default_place(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study"]) == 0
    assert sorted(path.name for path in (tmp_path / "study-report").iterdir()) == ["report.html", "results.json"]


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
