"""The script that checks healthy networks, planted faults and the cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import check
import pytest
import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Called with keywords, as those of other libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)
        )
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(self.body(x)).relu().mean((2, 3)))}


def build() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Small(), {"x": torch.randn(2, 3, 8, 8)}


def test_a_healthy_network() -> None:
    row = check.healthy(build)
    assert row is not None
    assert (row["layers"], row["above"], row["skipped"]) == (2, [], 0)
    assert check.healthy(build, largest=100) is None
    assert check.healthy(lambda: (nn.Linear(2, 2), {"x": torch.randn(2, 2)})) is None


def test_batches_have_the_inputs_shapes_and_a_pattern_for_each_class() -> None:
    first, again = (check.batches_like({"x": torch.randn(2, 3, 4), "flag": True}, 0) for _ in range(2))
    assert len(first) == check.BATCHES
    for (inputs, target), (others, _) in zip(first, again, strict=True):
        assert inputs["x"].shape == (check.BATCH, 3, 4)
        assert inputs["flag"] is True
        assert torch.equal(inputs["x"], others["x"])
        assert target.shape == (check.BATCH,)


def test_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "architectures", lambda: [("mine", "small", build), ("mine", "other", build)])
    file = tmp_path / "rows.json"
    check.all_healthy(file, "small", 1000.0, unseen=True)
    assert capsys.readouterr().out.rstrip().endswith("1 networks, 0 with a finding above info: none")
    monkeypatch.setattr(check, "healthy", lambda *_, **__: pytest.fail("measured again"))
    check.all_healthy(file, "small", 1000.0, unseen=True)
    assert "| mine: small | 2 | 0 |" in capsys.readouterr().out
