"""A short run of each fuzzer; the scripts do longer ones."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fuzz import command_line, files
from fuzz.judging import Outcome, faults

FUZZERS = {"files": files.fuzz, "command_line": command_line.fuzz}


@pytest.mark.parametrize("name", FUZZERS)
def test_some_cases(name: str, project: Path) -> None:
    assert FUZZERS[name](40, 0) == []


@pytest.mark.long
@pytest.mark.parametrize(("name", "cases"), [("files", 400), ("command_line", 400), ("kills", 100)])
def test_many_cases_by_the_script(name: str, cases: int) -> None:
    script = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, str(script), "--cases", str(cases), "--seed", "5000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, f"{cases} cases, 0 faults"), run.stdout + run.stderr


@pytest.mark.parametrize(
    ("outcome", "part"),
    [
        (Outcome(None, "", "", ValueError("x")), "ValueError came out"),
        (Outcome(1, "", "", None), "exit code 1"),
        (Outcome(2, "", "", None), "not one line"),
        (Outcome(2, "", "batchnorm: a\nb\n", None), "not one line"),
        (Outcome(2, "x", "batchnorm: a\n", None), "stdout is not empty"),
        (Outcome(2, "", "batchnorm: ValueError: a. batchnorm did not expect this\n", None), "nobody expected"),
        (Outcome(2, "", "batchnorm: failed at a.cpp\n", None), ".cpp in"),
        (Outcome(0, "\x1b[2J", "", None), "control character"),
    ],
)
def test_what_is_a_fault(outcome: Outcome, part: str) -> None:
    assert any(part in fault for fault in faults(outcome))
    assert faults(Outcome(2, "", "batchnorm: got x; it must be y\n", None)) == []
    assert faults(Outcome(0, "fine\n", "", None)) == []


def _other_mean(content: bytes) -> bytes:
    state = torch.load(io.BytesIO(content), weights_only=True)
    state["moments"][0][1].add_(1)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_a_loss_of_checks_is_seen(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer would find checkpoints whose checksum nobody looks at."""
    monkeypatch.setattr("batchnorm.population.checkpoint._digest", lambda _: "always the same")
    monkeypatch.setattr(files, "COMMANDS", {"progress": files.COMMANDS["progress"]})
    monkeypatch.setattr(files, "damaged", lambda good, name, source: (_other_mean(good[name]), False))
    assert any("is wrong" in fault for fault in files.fuzz(1, 0))
