"""Outputs of the tests are small, and are to be computed again all the same."""

from __future__ import annotations

import pytest

from batchnorm.memory import session


@pytest.fixture(autouse=True)
def small_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LEAST", 2**14)
