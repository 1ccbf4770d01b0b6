"""`batchnorm monitor`."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchnorm.cli.main import main
from cli.commands import START, fails, start
from diagnosis.test_curves import written


@pytest.mark.parametrize("named", [False, True])
def test_a_page(named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "run.jsonl")
    target = tmp_path / ("other.html" if named else "run.html")
    assert main(["monitor", str(file), *(["--html", str(target)] if named else [])]) == 0
    *layers, last = capsys.readouterr().out.splitlines()
    assert last == str(target)
    assert [line.split(":")[0] for line in layers] == ["1", "4", "7"]
    assert "Batch norm in training" in target.read_text()


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read" in fails(capsys, "monitor", str(tmp_path / "none"))
    file = written(tmp_path / "run.jsonl")
    assert "cannot write to" in fails(capsys, "monitor", str(file), "--html", str(tmp_path / "no" / "page.html"))


def test_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    process = start("monitor", str(tmp_path / "x"), code=f"import sys; sys.modules['matplotlib'] = None; {START}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith("batchnorm: the page needs matplotlib, ")
    assert errors.count("\n") == 1
