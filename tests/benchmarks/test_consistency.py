"""The measure against NumPy, on layers whose statistics are wrong by a known amount."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
import consistency
from consistency_networks import Architecture, crops
from support import oracle, tolerances
from support.comparison import close
from support.populations import images, inputs, layers, made


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (4, 3, 2, 5)])
def test_moments(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 100
    for actual, expected in zip(consistency.moments(x), oracle.moments(x.double().numpy()), strict=True):
        close(actual, expected, relative=tolerances.ASSOCIATIVITY)


def test_joined_is_of_all_rows() -> None:
    a, b = images(2, 7)
    together = consistency.joined(consistency.moments(a), consistency.moments(b))
    for actual, expected in zip(together, oracle.moments(torch.cat([a, b]).double().numpy()), strict=True):
        close(actual, expected, relative=tolerances.ASSOCIATIVITY)


def test_the_gap_is_the_worst_layers_worst_channels() -> None:
    net, batches = made("residual"), images(5, 2)
    gaps = []
    for name, rows in inputs(net, batches).items():
        layer = layers(net)[name]
        n, mean, m2 = oracle.moments(rows)
        var, running_var = m2 / n + layer.eps, layer.running_var.double().numpy() + layer.eps
        gaps += [abs(layer.running_mean.double().numpy() - mean) / np.sqrt(var), abs(np.log(var / running_var))]
    assert consistency.worst(net, batches) == pytest.approx(np.concatenate(gaps).max(), rel=tolerances.STATISTIC)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_one_channel_is_enough() -> None:
    net, batches = made("residual"), images(5, 2)
    bn.recalibrate(net, batches)
    layer = net.bn4
    right = layer.running_var[2].item() + layer.eps
    layer.running_var[2] *= 2
    expected = math.log((layer.running_var[2].item() + layer.eps) / right)
    assert consistency.worst(net, batches) == pytest.approx(expected, rel=tolerances.POPULATION)
    layer.running_mean[0] = math.nan
    assert math.isnan(consistency.worst(net, batches))


def test_a_nan_is_the_largest() -> None:
    assert math.isnan(consistency.largest([1.0, math.nan, 2.0]))
    assert consistency.largest([1.0, 2.0]) == 2
    assert consistency.largest([], 0.5) == 0.5


def test_torchs_average_is_ours() -> None:
    """What the script says of update_bn: 0 would be a comparison with itself, 1e-3 another definition."""
    off = consistency.off_update_bn(made("residual"), torch.cat(images(8, 3)))
    assert off < tolerances.ASSOCIATIVITY


def test_a_row() -> None:
    """Every method leaves something, and "exact" least; a network that it refuses has the others'."""
    data = torch.cat(images(40, 40))
    found = consistency.gaps_of(made("residual"), data)["8"]
    assert found[consistency.SAME] <= consistency.CLAIM
    assert found[consistency.OTHER] <= consistency.CLAIM
    assert min(found["pooled"], found["average"]) > 0.01
    layer = nn.BatchNorm2d(3)
    shared = consistency.gaps_of(nn.Sequential(layer, nn.ReLU(), layer), data)
    assert set(shared["8"]) == {"pooled", "average"}


@pytest.mark.parametrize("output", ["tensor", "dict"])
def test_logits(output: str) -> None:
    x = torch.randn(2, 10, 3, 3)
    actual = consistency.logits({"tensor": x, "dict": {"out": x, "aux": x + 1}}[output])
    close(actual, x.double().mean((2, 3)).numpy(), absolute=tolerances.OUTPUT)
    assert torch.equal(consistency.logits((x[:, :, 0, 0], x)), x[:, :, 0, 0])


def row(exact: float | None, other: float, double: float | None = None) -> dict[str, object]:
    gaps: dict[str, float] = {"pooled": 0.5, "average": 0.25}
    if exact is not None:
        gaps |= {consistency.SAME: exact, consistency.OTHER: other}
    if double is not None:
        gaps[consistency.OTHER_FLOAT64] = double
    state = {"update_bn": 1e-14, "2": gaps, "8": gaps, "64": gaps}
    return {"layers": 7, "running": 3.0, "untrained": state, "trained": state}


def test_the_tables() -> None:
    rows = {"a": row(1e-7, 2e-7), "b": row(2e-7, 3e-5, 4e-13), "c": row(None, 0), "d": row(2e-5, math.nan)}
    first = consistency.by_architecture(rows)
    assert (
        first[2]
        == "| a | 7 | 1.0e-07 / 1.0e-07 | 2.0e-07 / 2.0e-07 | 5.0e-01 / 5.0e-01 | 2.5e-01 / 2.5e-01 | 3.0e+00 |"
    )
    assert first[4].startswith("| c | 7 | refused / refused |")
    assert {line.count("|") for line in first} == {8}
    assert consistency.by_size(rows)[2] == "| 2 | 2.0e-07 / 2.0e-05 | 5.0e-01 / 5.0e-01 | 2.5e-01 / 2.5e-01 |"
    assert consistency.summary(rows) == [
        "exact: 2 of 4 architectures within 1e-05, 1 refused",
        "exact, other batches: 1 of 4; the others in float64: at most 4.0e-13",
        "average: torch's update_bn within 1.0e-14 in float64",
    ]


def small() -> nn.Module:
    """Dropout, so that "average" has random numbers to draw, and ten classes."""
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def test_the_whole_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One small network from its weights to the table; what is in the file is not measured again."""
    kept = tmp_path / "consistency.json"
    monkeypatch.setattr(consistency, "ARCHITECTURES", {"small": Architecture("small", small, partial(crops, size=8))})
    monkeypatch.setattr("sys.argv", ["consistency.py", "--results", str(kept)])
    consistency.main()
    out = capsys.readouterr().out
    assert "exact: 1 of 1 architectures within 1e-05, 0 refused" in out
    numbers = json.loads(kept.read_text())["small"]
    assert numbers["layers"] == 2
    assert numbers["running"] > 0.01
    assert numbers["trained"]["8"]["pooled"] != numbers["untrained"]["8"]["pooled"]
    assert max(numbers[state]["update_bn"] for state in consistency.STATES) < tolerances.ASSOCIATIVITY
    monkeypatch.setattr(consistency, "measure", None)
    consistency.main()
    assert capsys.readouterr().out == out


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["consistency.py", "resnet19"])
    with pytest.raises(SystemExit):
        consistency.main()
    assert "got resnet19; the architectures are resnet18" in capsys.readouterr().err
