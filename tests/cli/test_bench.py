"""`batchnorm bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from batchnorm.bench import cuda, measure, suites
from batchnorm.cli.main import main
from cli.commands import fails


def test_a_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = suites.Case("small", (8, 3), suites.FIRST, "bfloat16")
    monkeypatch.setattr(suites, "cases", lambda suite, dtypes, _: [case] if dtypes == ("bfloat16",) else [])
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    path = tmp_path / "bench.json"
    assert main(["bench", "--suite", "small", "--dtype", "bfloat16", "--no-compile", "--json", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for row in json.loads(path.read_text())["rows"]:
        assert f"{1e3 * row['seconds']['ours']:.3f}" in captured.out  # whole numbers, whatever the width
    assert "geometric mean" in captured.out


def test_several_dtypes_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(suites, "cases", lambda suite, dtypes, _: asked.append(dtypes) or [])
    assert main(["bench", "--dtype", "float16", "--dtype", "float32", "--dtype", "float16"]) == 0
    assert main(["bench"]) == 0
    assert asked == [("float16", "float32"), ("float32", "bfloat16")]


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where torch finds no GPU")
def test_on_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch finds no GPU" in fails(capsys, "bench", "--device", "cuda")


@pytest.mark.parametrize("option", ["--peers", "--warm"])
def test_what_is_for_the_cpu_alone(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "check", lambda: None)
    assert f"{option} is for the CPU" in fails(capsys, "bench", "--device", "cuda", option)


def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is asked for, and what is written; a stand-in measures."""

    def run(cases: list[suites.Case], **_: object) -> tuple[list[measure.Row], cuda.Gpu]:
        assert {case.dtype for case in cases} == {"float32", "bfloat16", "float16"}
        assert {case.residual for case in cases} == {False, True}
        case = cases[0]
        seconds = {"ours": 0.001, "torch": 0.002}
        row = measure.Row(case.suite, case.shape, case.layout, case.dtype, "both", seconds, {}, copy_share=0.75)
        return [row], cuda.Gpu("a GPU", 1, 1e12)

    monkeypatch.setattr(cuda, "check", lambda: None)
    monkeypatch.setattr(cuda, "run", run)
    path = tmp_path / "bench.json"
    assert main(["bench", "--suite", "small", "--device", "cuda", "--json", str(path)]) == 0
    assert "75%" in capsys.readouterr().out
    document = json.loads(path.read_text())
    assert document["gpu"]["name"] == "a GPU"
    assert document["gpu"]["copy_bytes_per_second"] == 1e12
    assert document["rows"][0]["copy_share"] == 0.75
