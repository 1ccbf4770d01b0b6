"""A short run of the random calls; `make sanitize` has the long one."""

from __future__ import annotations

import pytest

from fuzz import operators


def test_random_calls(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert operators.main(["--cases", "150", "--seed", "11", "--level", level]) == 0, capsys.readouterr().err


def test_random_calls_from_several_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert operators.main(["--cases", "100", "--seed", "12", "--threads", "4"]) == 0, capsys.readouterr().err


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from batchnorm.kernels import reference

    right = reference.normalize
    monkeypatch.setattr(reference, "normalize", lambda *arguments: right(*arguments) + 1e-2)
    assert operators.main(["--cases", "3", "--seed", "1"]) == 1
    assert "--seed 1 --first 0 --cases 1" in capsys.readouterr().err
