"""The examples run, and what they print is so."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.threads import one_thread

__all__ = ["one_thread"]
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SECONDS = 240  # for a script that takes ten on an idle machine

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str) -> dict[str, Any]:
    """The names of a script after its last line."""
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def numbers(text: str) -> list[float]:
    """The percentages of a text."""
    return [float(number) for number in re.findall(r"([\d.]+) %", text)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_needs_and_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    words = ast.get_docstring(ast.parse(text)) or ""
    assert 'pip install "batchnorm[' in words
    assert f"examples/{path.name}" in words
    assert f"({path.name})" in (FOLDER / "README.md").read_text()


def test_every_extra_that_an_example_names_exists() -> None:
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0], re.M))
    for path in EXAMPLES:
        (named,) = re.findall(r'pip install "batchnorm\[([\w,]+)\]"', path.read_text())
        assert set(named.split(",")) <= extras


def test_torch(capsys: pytest.CaptureFixture[str]) -> None:
    run("digits_torch")
    before, after = numbers(capsys.readouterr().out)
    assert 50 < before < after < 100


def test_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("digits_lightning")
    printed = capsys.readouterr().out
    assert numbers(printed.split("validation accuracy:")[1])[0] > 90
    assert names["recalibrate"].result.samples == 1437


def test_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("digits_transformers")
    printed = capsys.readouterr().out
    assert "layers converted: 6" in printed
    assert numbers(printed)[-1] > 80
    assert names["recalibrate"].result.samples == 1437


def test_fold(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("fold_onnx")
    printed = capsys.readouterr().out
    assert "2 of 2 folded" in printed
    assert numbers(printed) == [100.0]
    assert names["difference"] < 1e-5 * names["expected"].abs().max()


@pytest.mark.long  # three processes, each of which imports torch and scikit-learn
def test_distributed() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(FOLDER / "recalibrate_distributed.py")],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    same, beside = run.stdout.splitlines()
    assert same == "1797 images, 2 processes: the same bits in each"
    (off,) = re.findall(r"by (\S+) at the most", beside)
    assert float(off) < 1e-12
