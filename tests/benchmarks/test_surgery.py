"""Surgery on architectures that others wrote, through the script that measures it on many."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize("name", ["ResNet, basic", "RegNet", "MobileNetV2", "LeViT"])
def test_an_architecture_of_transformers(name: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/surgery.py", "--only", f"transformers/{name}", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    row = json.loads(file.read_text())[f"transformers/{name}"]
    assert row["converted"] == row["layers"] > 0
    assert row["bits"]
    assert row["step"] <= 1e-5
    assert row["fused step"] <= 1e-5
    assert row["left"] == 0
    assert row["fold"] <= 1e-4
    assert row["bfloat16"][1] <= 1.5 * row["bfloat16"][0]


@pytest.mark.long
def test_counts_alone() -> None:
    command = [sys.executable, "benchmarks/surgery.py", "--counts", "--only", "transformers/ResNet, basic"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    assert "| transformers/ResNet, basic | 8 | 8 | 4 | 0 | 3 | 8 | 0 | 0 | " in run.stdout
    assert "| part | 8 |" in run.stdout


@pytest.mark.long
def test_other_draws_of_the_parameters() -> None:
    command = [sys.executable, "benchmarks/surgery.py", "--draws", "3", "--only", "transformers/ResNet, basic"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    row = run.stdout.splitlines()[-1]
    assert row.startswith("| transformers/ResNet, basic |")
    ratios = re.findall(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", row)
    assert len(ratios) == 2
    for estimate, low, high in ratios:
        assert 0.5 < float(low) <= float(estimate) <= float(high) < 2
