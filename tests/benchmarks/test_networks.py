"""The script that times whole networks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from networks import SETTINGS, contenders, resnet20

ROOT = Path(__file__).parents[2]


def test_resnet20_has_the_layers_and_parameters_of_the_paper() -> None:
    net = resnet20()
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 19
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 0.27
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_fused_layers_do_what_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    forward = batchnorm.BatchNorm.forward

    def look(self: batchnorm.BatchNorm, input: Tensor, **given: Any) -> Tensor:
        calls.append(given)
        return forward(self, input, **given)

    fused = contenders("resnet20", "contiguous", SETTINGS["cpu"], "cpu")["fused"].model
    monkeypatch.setattr(batchnorm.BatchNorm, "forward", look)  # not a hook: with one, fused modules run unfused
    fused(torch.randn(2, 3, 32, 32))
    assert [call.get("activation") for call in calls] == ["relu"] * 19
    assert sum(call.get("residual") is not None for call in calls) == 9


def test_the_table() -> None:
    command = [sys.executable, "benchmarks/networks.py", "resnet20", "--layouts", "contiguous", "--repeats", "1"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    rows = [line.split(" | ")[:3] for line in printed.splitlines() if line.startswith("| resnet20")]
    assert rows == [["| resnet20", "contiguous", "converted"], ["| resnet20", "contiguous", "fused"]]


def test_an_unknown_network_is_refused_with_the_names_that_there_are() -> None:
    command = [sys.executable, "benchmarks/networks.py", "resnet21"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 2
    assert "got resnet21; the networks are resnet20" in run.stderr
