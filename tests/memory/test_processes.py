"""`recompute` in several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recompute_scenarios

from support import processes

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return processes.run(
        list(recompute_scenarios.SCENARIOS), 2, folder, timeout=150, script=recompute_scenarios.__file__
    )


@pytest.mark.parametrize("scenario", recompute_scenarios.SCENARIOS)
def test_the_same_bits_in_each_process(found: Found, scenario: str) -> None:
    for process in found:
        result = process[scenario]
        assert result["differ"] == []
        assert result["compared"] > 10
        assert len(result["recomputed"]) >= 3
