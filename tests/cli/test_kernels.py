"""`batchnorm kernels`."""

from __future__ import annotations

import pytest

import batchnorm
from batchnorm.cli.main import main


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels"]) == 0
    assert capsys.readouterr().out == f"{batchnorm.kernels()}\n"
