"""`batchnorm explain`."""

from __future__ import annotations

import sys

import pytest

from batchnorm.cli.main import main
from batchnorm.diagnosis.catalogue import CHECKS, explanation
from cli.commands import fails


def test_all_checks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, check in zip(lines, CHECKS.values(), strict=False):
        assert line.startswith(f"{check.code}  {check.name}  ")
    assert all(line.endswith(check.found) for line, check in zip(lines, CHECKS.values(), strict=False))
    assert lines[-1] == "* --fix does it"


@pytest.mark.parametrize("name", ["BN101", "bn101", "momentum-convention"])
def test_one_check_is_its_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == 0
    assert capsys.readouterr().out == explanation(CHECKS["BN101"])


def test_in_a_terminal_it_is_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["explain", "BN101"]) == 0
    text = capsys.readouterr().out
    assert "Why it hurts" in text
    assert "##" not in text
    assert main(["explain"]) == 0
    assert "BN101" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["BN999", "BN", "", "\x1b[2J"])
def test_no_such_check_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such check. `batchnorm explain` lists them" in fails(capsys, "explain", name)
