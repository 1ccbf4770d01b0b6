"""A run through a table of experiments: what it leaves, that it goes on where it was, and what is wrong use."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import batchnorm
from batchnorm.errors import ProcessError, UsageError
from batchnorm.study.experiment import Experiment
from batchnorm.study.runner import Study, study
from study.trials import trial

LEFT = ["figures", "report.html", "results.json", "tasks"]


def go(out: Path, *experiments: Experiment[Any], processes: int = 1, **options: Any) -> Study:
    console = Console(file=io.StringIO())
    return study(out, console=console, experiments=experiments or (trial(),), processes=processes, **options)


def results(out: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (out / "results.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


def done(said: Path) -> list[int]:
    """The numbers of the tasks that were done, in order."""
    return [int(line.split()[0]) for line in said.read_text().splitlines()]


def test_what_a_run_leaves(tmp_path: Path) -> None:
    outcome = go(tmp_path / "a" / "b", trial("one"), trial("two", count=6))
    out = tmp_path / "a" / "b"
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == LEFT
    assert outcome.page == out / "report.html"
    assert [finding.measured.count for finding in outcome.findings] == [8, 6]
    content = results(out)
    assert list(content["experiments"]) == ["one", "two"]
    two = content["experiments"]["two"]
    assert two["plan"]["count"] == 6
    assert two["findings"] == [outcome.findings[1].record()]
    mean = 0.30558  # of the training part's pixels, see the digits
    assert two["numbers"]["values"] == pytest.approx([mean + 0.1 * i for i in range(6)], abs=1e-3)
    assert (content["schema"], content["quick"], content["layers"]) == (3, False, "ours")
    assert content["data"]["shape"] == [1, 8, 8]
    assert (content["data"]["train"], content["data"]["test"], content["data"]["classes"]) == (1437, 360, 10)
    assert content["software"]["batchnorm"] == batchnorm.__version__
    html = outcome.page.read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert "with ours." in html


def test_quick_is_another_plan(tmp_path: Path) -> None:
    experiment = Experiment(**{**vars(trial()), "quick": trial(count=7).full})
    go(tmp_path, experiment, quick=True)
    assert results(tmp_path)["quick"] is True
    assert results(tmp_path)["experiments"]["trial"]["plan"]["count"] == 7


def test_what_has_no_quick_plan_needs_the_full_study(tmp_path: Path) -> None:
    said = tmp_path / "said"
    long = replace(trial("long", said=str(said), trouble="raise", at=0), quick=None)
    outcome = go(tmp_path / "out", trial(), long, quick=True)
    assert not said.exists(), "nothing of it is done"
    assert [finding.verdict.value for finding in outcome.findings] == ["supported", "needs the full study"]
    assert list(results(tmp_path / "out")["experiments"]["long"]) == ["findings"]
    assert results(tmp_path / "out")["experiments"]["long"]["findings"] == [outcome.findings[1].record()]
    assert "This question needs the full study" in outcome.page.read_text(encoding="utf-8")


def test_the_time_left_is_told_from_the_start(tmp_path: Path) -> None:
    stream = io.StringIO()
    study(tmp_path, console=Console(file=stream), experiments=[trial(trouble="slow")], processes=1)
    assert re.fullmatch(r"study: \d+% done, about 5 s left\n", stream.getvalue())


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, ""), ({"quick": True}, " --quick"), ({"layers": "torch"}, " --layers torch")],
)
def test_the_page_says_the_command_that_repeats_it(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    out = tmp_path / "two words"
    page = go(out, **options).page.read_text(encoding="utf-8")
    assert f"batchnorm study{words} --out &#39;{out}&#39;" in page


def test_the_users_data(tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    np.savez(file, x=np.random.default_rng(0).normal(size=(500, 7)), y=np.arange(500) % 3)
    page = go(tmp_path / "out", data=str(file)).page.read_text(encoding="utf-8")
    data = results(tmp_path / "out")["data"]
    assert (data["name"], data["shape"], data["classes"], data["train"]) == ("mine.npz", [7], 3, 400)
    assert f"batchnorm study --data {file} --out" in page


def test_wrong_data_are_noticed_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    np.savez(file, x=np.zeros((5, 2)), y=np.arange(5))
    with pytest.raises(UsageError, match="400 numeric samples at least"):
        go(tmp_path / "out", trial(trouble="raise", at=0), data=str(file))


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    said, out = tmp_path / "said", tmp_path / "out"
    go(out, trial(said=str(said)))
    assert sorted(done(said)) == list(range(8))
    before = (out / "results.json").read_bytes()
    go(out, trial(said=str(said)))
    assert len(done(said)) == 8
    assert (out / "results.json").read_bytes() == before


def test_tasks_are_done_in_a_mixed_order(tmp_path: Path) -> None:
    """So that the time left can be told early."""
    go(tmp_path / "out", trial(said=str(tmp_path / "said"), count=30))
    assert done(tmp_path / "said") != sorted(done(tmp_path / "said"))


def test_after_an_error_a_run_goes_on(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with pytest.raises(ArithmeticError, match="trouble with draw 5"):
        go(tmp_path / "out", trial(said=str(said), trouble="raise"))
    first = done(said)
    assert first[-1] == 5
    assert not (tmp_path / "out" / "results.json").exists()
    with pytest.raises(ArithmeticError):
        go(tmp_path / "out", trial(said=str(said), trouble="raise"))
    again = done(said)[len(first) :]
    assert again[-1] == 5
    assert not set(first[:-1]) & set(again), "what was done is kept"


def test_another_setting_begins_anew(tmp_path: Path) -> None:
    said = tmp_path / "said"
    go(tmp_path / "out", trial(said=str(said)))
    go(tmp_path / "out", trial(said=str(said)), layers="torch")
    assert len(done(said)) == 16
    assert results(tmp_path / "out")["layers"] == "torch"
    go(tmp_path / "out", trial(said=str(said)))
    assert len(done(said)) == 16, "both are kept"


@pytest.mark.long
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    for processes in (1, 2):
        go(tmp_path / str(processes), trial(count=20), processes=processes)
    one, two = ((tmp_path / name / "results.json").read_bytes() for name in "12")
    assert one == two


@pytest.mark.long
def test_a_worker_that_dies_loses_only_its_task(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with pytest.raises(ProcessError, match="exit code -9"):
        go(tmp_path / "out", trial(said=str(said), trouble="die"), processes=2)
    before = len(list((tmp_path / "out" / "tasks").rglob("*.json")))
    assert len(done(said)) - 2 <= before < 8


SLOW = """
import sys
from pathlib import Path
from rich.console import Console
from batchnorm.study.runner import study
from study.trials import trial

if __name__ == "__main__":
    study(Path(sys.argv[1]), console=Console(), experiments=(trial(count=16, trouble="slow"),), processes=2)
"""


def start(script: Path, out: Path) -> subprocess.Popen[bytes]:
    script.write_text(SLOW)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, str(script), str(out)], env=os.environ | {"PYTHONPATH": path})


def stored(out: Path) -> int:
    return len(list(out.glob("tasks/*/*.json")))


def wait_for(out: Path, number: int) -> None:
    end = time.monotonic() + 120
    while stored(out) < number:
        assert time.monotonic() < end, "no results"
        time.sleep(0.02)


@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    script, out = tmp_path / "slow.py", tmp_path / "killed"
    for enough in (3, 8):  # twice
        process = start(script, out)
        wait_for(out, enough)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "results.json").exists()
    time.sleep(0.5)
    assert enough <= stored(out) < 16
    assert start(script, out).wait(120) == 0
    whole = tmp_path / "whole"
    go(whole, trial(count=16, trouble="slow"))
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    leftovers = [path for path in out.rglob(".*") if path.name != ".lock"]
    assert len(leftovers) <= 2, "what was being written when it was killed"


@pytest.mark.long
def test_two_runs_at_once_use_one_directory(tmp_path: Path) -> None:
    script, out = tmp_path / "slow.py", tmp_path / "out"
    both = [start(script, out) for _ in range(2)]
    assert [process.wait(240) for process in both] == [0, 0]
    go(tmp_path / "alone", trial(count=16, trouble="slow"))
    assert (out / "results.json").read_bytes() == (tmp_path / "alone" / "results.json").read_bytes()
    assert stored(out) == 16


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_in_the_way_is_noticed_before_the_work(tmp_path: Path, inside: bool) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    out = file / "report" if inside else file
    with pytest.raises(UsageError, match=rf"^cannot write to {re.escape(str(out))}: .*\. Choose another --out$"):
        go(out, trial(trouble="raise", at=0))
    assert file.read_text() == "mine"


def test_a_directory_that_takes_no_files_is_noticed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        go(tmp_path, trial(trouble="raise", at=0))


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_a_directory_in_the_place_of_a_result_is_a_usage_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="cannot write to"):
        go(tmp_path)


def test_an_error_of_the_page_is_no_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(document: object) -> str:
        raise FileNotFoundError(2, "the template is gone")

    monkeypatch.setattr("batchnorm.study.runner.page", broken)
    with pytest.raises(FileNotFoundError):
        go(tmp_path)


def test_results_that_something_removes_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.study.result_cache.ResultCache.put", lambda *_: None)
    with pytest.raises(UsageError, match="is gone; something else removes files"):
        go(tmp_path)


def test_numbers_that_are_not_finite_name_the_task(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^the task \('draw', 5\) of study\.trials found numbers that are inf or NaN"):
        go(tmp_path, trial(trouble="nan"))


def test_kept_results_that_were_damaged_are_computed_again(tmp_path: Path) -> None:
    go(tmp_path)
    whole = (tmp_path / "results.json").read_bytes()
    for file, content in zip(sorted(tmp_path.glob("tasks/*/*.json")), ("[]", "null", "", '{"args": 1}'), strict=False):
        file.write_text(content)
    go(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == whole


def test_a_name_that_is_too_long_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write to .*: File name too long"):
        go(tmp_path / ("n" * 300))
