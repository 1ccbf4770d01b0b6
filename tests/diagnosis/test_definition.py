"""A check is a row that runs."""

from __future__ import annotations

from batchnorm.diagnosis.catalogue import CHECKS
from batchnorm.diagnosis.definition import Check


def test_rows_say_what_their_functions_do() -> None:
    for check in CHECKS.values():
        assert isinstance(check, Check)
        assert check.run.__doc__
        assert not check.found.endswith(".")
        assert not check.remedy.endswith(".")
