"""The run through the table of experiments, and the two files that it leaves."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import batchnorm
from batchnorm.errors import UsageError
from batchnorm.study.experiments import EXPERIMENTS, Experiment, Study, study
from batchnorm.study.speed import Plan

TINY = Plan(seeds=1, steps=4, evaluate_every=2, hidden=(16,))
SCHEMA = Path(__file__).parents[2] / "docs" / "study.md"
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def table_of(full: Plan = TINY, quick: Plan = TINY) -> list[Experiment[Any, Any]]:
    return [replace(row, full=full, quick=quick) for row in EXPERIMENTS if row.name == "speed"]


def run(out: Path, *, quick: bool = True, experiments: Sequence[Experiment[Any, Any]] | None = None) -> Study:
    return study(out, quick=quick, console=Console(file=io.StringIO()), experiments=experiments or table_of())


def results(out: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    return content


def leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every path in a JSON value, with the kind of what is there."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, f"{path}[]")
    else:
        yield path, KINDS[type(value)]


def documented() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", SCHEMA.read_text(encoding="utf-8"), re.MULTILINE)
    return {path: set(kinds.strip().split(" or ")) for path, kinds in rows if not path.startswith("--")}


def test_results_are_as_documented(tmp_path: Path) -> None:
    run(tmp_path)
    schema = documented()
    seen = set(leaves(results(tmp_path)))
    assert {path for path, _ in seen} == set(schema)
    wrong = {(path, kind) for path, kind in seen if kind not in schema[path]}
    assert not wrong


def test_the_same_run_leaves_the_same_numbers(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(first)
    run(second)
    one, other = results(first), results(second)
    assert one.pop("environment") != other.pop("environment")
    assert one == other


def test_the_page_holds_the_numbers_of_the_results(tmp_path: Path) -> None:
    outcome = run(tmp_path / "a" / "b")
    assert outcome.page == tmp_path / "a" / "b" / "report.html"
    html = outcome.page.read_text(encoding="utf-8")
    cells = results(outcome.page.parent)["experiments"]["speed"]["cells"]
    assert len(cells) == 4
    for cell in cells:
        for key in ("accuracy_mean", "accuracy_low", "accuracy_high", "one_at_a_time", "in_batches"):
            assert f"{100 * cell[key]:.1f}" in html
        assert f"<td>{cell['different']}/360</td>" in html
    for sentence in outcome.sections[0].summary:
        assert sentence in html


def test_the_command_repeats_the_run(tmp_path: Path) -> None:
    out = tmp_path / "two words"
    for quick, option in ((True, "--quick "), (False, "")):
        page = run(out, quick=quick).page.read_text(encoding="utf-8")
        command = f"batchnorm study {option}--out '{out}'"
        assert results(out)["environment"]["command"] == command
        assert results(out)["quick"] is quick
        assert command.replace("'", "&#39;") in page


def test_quick_is_another_plan(tmp_path: Path) -> None:
    table = table_of(full=replace(TINY, seeds=2))
    run(tmp_path, quick=True, experiments=table)
    assert results(tmp_path)["experiments"]["speed"]["plan"]["seeds"] == 1
    run(tmp_path, quick=False, experiments=table)
    assert results(tmp_path)["experiments"]["speed"]["plan"]["seeds"] == 2


def test_every_experiment_of_the_table_is_run_under_its_name(tmp_path: Path) -> None:
    row = table_of()[0]
    outcome = run(tmp_path, experiments=[row, replace(row, name="again")])
    assert list(results(tmp_path)["experiments"]) == ["speed", "again"]
    assert len(outcome.sections) == 2


def test_the_real_table_has_one_row_a_name_and_quick_is_less_work() -> None:
    assert len({row.name for row in EXPERIMENTS}) == len(EXPERIMENTS)
    for row in EXPERIMENTS:
        assert row.quick.work < row.full.work


def test_the_environment_is_this_one(tmp_path: Path) -> None:
    run(tmp_path)
    environment = results(tmp_path)["environment"]
    assert environment["batchnorm"] == batchnorm.__version__
    assert environment["torch"] == torch.__version__
    assert environment["kernels"] in str(batchnorm.kernels())


def test_threads_are_given_back(tmp_path: Path, threads: None) -> None:
    torch.set_num_threads(2)
    run(tmp_path)
    assert torch.get_num_threads() == 2


def never(plan: object, advance: object) -> None:
    raise AssertionError("nothing may be computed that cannot be written")


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_in_the_way_is_noticed_before_the_work(tmp_path: Path, inside: bool) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    out = file / "report" if inside else file
    with pytest.raises(UsageError, match=rf"^cannot write to {re.escape(str(out))}: .*\. Choose another --out$"):
        run(out, experiments=[replace(table_of()[0], run=never)])
    assert file.read_text() == "mine"


def test_a_directory_that_takes_no_files_is_noticed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        run(tmp_path, experiments=[replace(table_of()[0], run=never)])


def test_a_directory_in_the_place_of_a_result_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UsageError, match="cannot write to"):
        run(tmp_path)


def test_an_error_of_the_page_is_no_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(document: object) -> str:
        raise FileNotFoundError(2, "the template is gone")

    monkeypatch.setattr("batchnorm.study.experiments.page", broken)
    with pytest.raises(FileNotFoundError):
        run(tmp_path)
