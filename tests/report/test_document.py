"""Numbers as text."""

from __future__ import annotations

import pytest

from batchnorm.report.document import percent


@pytest.mark.parametrize(("fraction", "text"), [(0.975, "97.5"), (0.97222, "97.2"), (1.0, "100.0"), (0.0, "0.0")])
def test_percent(fraction: float, text: str) -> None:
    assert percent(fraction) == text
