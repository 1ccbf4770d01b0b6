"""Two trees of the package in one run: the current one twice, and one that computes something else."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import batchnorm
import versions
from batchnorm.bench import suites
from batchnorm.bench.measure import AnswersDifferError
from batchnorm.errors import BatchNormError, UsageError

OFF = """
_right = BatchNorm.forward
BatchNorm.forward = lambda self, *args, **options: _right(self, *args, **options) * 1.1
"""


def tree(folder: Path, more: str = "") -> Path:
    """A folder with the current package in it, and some code at the end of its `__init__.py`."""
    package = folder / "batchnorm"
    shutil.copytree(Path(batchnorm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.cpp"))
    native = importlib.util.find_spec("batchnorm._native")
    assert native is not None
    assert native.origin is not None
    shutil.copy(native.origin, package / "_native.so")
    with (package / "__init__.py").open("a") as file:
        file.write(more)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "SUITES", {"quick": ((6, 3, 4, 5), (8, 3, 5))})


@pytest.mark.long
def test_two_trees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, file = tree(tmp_path / "before"), tree(tmp_path / "after"), tmp_path / "versions.json"
    versions.main([str(before), str(after), "--threads", "1", "--seconds", "0.001", "--json", str(file)])
    document = json.loads(file.read_text())
    for name, folder in (("before", before), ("after", after)):
        assert document[name]["file"] == str(folder / "batchnorm" / "__init__.py")
        assert document[name]["kernels"] == batchnorm.kernels()[0].implementation
    cases = versions.cases("quick", list(suites.USUAL["cpu"]))
    assert {case.layout for case in cases} == {suites.FIRST, suites.LAST, suites.AXIS}
    assert {(case.activation, case.residual, case.mask) for case in cases} == {
        (None, False, False),
        ("relu", False, False),
        ("relu", True, False),
        (None, False, True),
    }
    assert len(document["rows"]) == len(cases) * len(versions.PHASES)
    assert all(row["before"] > 0 and row["after"] > 0 and row["ratio"] > 0 for row in document["rows"])
    out = capsys.readouterr().out
    assert out.count("\n| (") == len(document["rows"])
    for phase in versions.PHASES:
        assert f"- {phase}: geometric mean " in out


def test_other_answers_are_refused(tmp_path: Path) -> None:
    arguments = [tree(tmp_path / "before"), tree(tmp_path / "after", OFF), "--seconds", "0.001"]
    with pytest.raises(AnswersDifferError, match=r"after on .*: y differs from that of before in .*% of the values"):
        versions.main([str(argument) for argument in arguments])


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"got .* for before; it must be a folder that contains batchnorm/"):
        versions.Version("before", tmp_path, 1)


def test_another_package_than_the_folders_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "worker.py"
    elsewhere.write_text("""print('{"file": "/elsewhere/batchnorm/__init__.py"}', flush=True); input()""")
    monkeypatch.setattr(versions, "WORKER", elsewhere)
    with pytest.raises(BatchNormError, match="for before, but the process imported /elsewhere"):
        versions.Version("before", tree(tmp_path), 1)


def test_a_process_that_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "batchnorm").mkdir()
    (tmp_path / "batchnorm" / "__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises(BatchNormError, match="before: the process ended with exit code 3"):
        versions.Version("before", tmp_path, 1)


def test_the_summary() -> None:
    first, second = versions.cases("quick", ["float32"])[:2]
    rows = [
        versions.Row(case, phase, 2, 1, ratio)
        for phase in versions.PHASES
        for case, ratio in ((first, 2.0), (second, 0.5))
    ]
    worst = "(6, 3, 4, 5), channels first, float32, no activation"
    assert versions.summary(rows)[0] == f"- forward: geometric mean 1.000 over 2 cases, worst 2.00 at {worst}"
