"""The script's rounds and its table; not its times."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import monitor


@pytest.mark.parametrize("name", ["small", "small+ours"])
def test_rounds_are_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = monitor.measured(monitor.network(name), torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), 1)
    assert {way: len(values) for way, values in times.items()} == dict.fromkeys(monitor.WAYS, 1)
    steps = monitor.Contender.steps

    def changed(self: Any, *data: Any) -> float:
        self.net[0].weight.data.normal_()
        return steps(self, *data)

    monkeypatch.setattr(monitor.Contender, "steps", changed)
    with pytest.raises(AssertionError, match="other weights"):
        monitor.measured(monitor.network(name), torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), 1)


def test_the_table() -> None:
    times = {"without": [10.0, 20.0, 30.0], "every 10": [11.0, 21.0, 36.0]}
    assert monitor.table("net", times)[1] == "| net | every 10 | 21.0 | 11.0 | 1.100 (1.050 to 1.200) |"
