"""Which weight an input was computed with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.diagnosis.linear_weight import linear_weight

FOUND = {
    "linear": (nn.Linear(4, 5), (3, 4)),
    "no bias": (nn.Linear(4, 5, bias=False), (3, 4)),
    "sequences": (nn.Linear(4, 5), (3, 2, 4)),
    "sequences without bias": (nn.Linear(4, 5, bias=False), (3, 2, 4)),
    "convolution": (nn.Conv2d(4, 5, 3), (2, 4, 6, 6)),
    "groups": (nn.Conv1d(4, 4, 3, groups=4, bias=False), (2, 4, 6)),
    "transposed": (nn.ConvTranspose2d(4, 5, 3), (2, 4, 6, 6)),
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("half", [False, True])
def test_found(name: str, half: bool) -> None:
    layer, shape = FOUND[name]
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = layer(x)
    assert linear_weight(y) is layer.weight
    assert linear_weight(y.transpose(0, 1)) is layer.weight


def test_not_found() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    cases: list[Any] = [x, layer(x).relu(), layer(x) + 1, x @ (layer.weight * 2), layer(x).detach()]
    layer.weight.requires_grad_(False)
    cases.append(layer(x))
    assert [linear_weight(case) for case in cases] == [None] * len(cases)
