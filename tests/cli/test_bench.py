"""`batchnorm bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchnorm.bench import measure, suites
from batchnorm.cli.main import main
from cli.commands import fails


def test_a_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = suites.Case("small", (8, 3), suites.FIRST, "bfloat16")
    monkeypatch.setattr(suites, "cases", lambda suite, dtypes: [case] if dtypes == ("bfloat16",) else [])
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    path = tmp_path / "bench.json"
    assert main(["bench", "--suite", "small", "--dtype", "bfloat16", "--no-compile", "--json", str(path)]) == 0
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


@pytest.mark.parametrize("name", ["no/bench.json", "", "n" * 300])
def test_a_file_that_cannot_be_written_is_noticed_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "run", lambda *_, **__: pytest.fail("it was measured"))
    assert "cannot write to" in fails(capsys, "bench", "--json", str(tmp_path / name))
