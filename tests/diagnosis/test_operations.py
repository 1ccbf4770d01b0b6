"""What nodes of graphs do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.diagnosis.operations import Kind, Operation, is_per_channel, one_a_channel, operation
from batchnorm.surgery.tracing import plain_call, regions
from support.networks import Calls


def before(code: Any, **modules: nn.Module) -> Operation:
    """The node whose value a norm layer gets."""
    model = Calls(lambda m, x: m.norm(code(m, x)), norm=nn.BatchNorm1d(4), **modules)
    (region,) = regions(model, plain_call, modes=(True,)).traced
    (node,) = (node for node in region.graph.nodes if node.target == "norm")
    return operation(region, node.args[0])


FUNCTIONS: dict[str, tuple[Any, Kind]] = {
    "input": (lambda m, x: x, "input"),
    "relu": (lambda m, x: x.relu(), "elementwise"),
    "gelu": (lambda m, x: F.gelu(x), "elementwise"),
    "dropout": (lambda m, x: F.dropout(x, 0.3, training=m.training), "dropout"),
    "dropout of nothing": (lambda m, x: F.dropout(x, 0.0), "identity"),
    "a number": (lambda m, x: 2 * x + 1, "scale"),
    "sum": (lambda m, x: x + x.relu(), "join"),
    "cat": (lambda m, x: torch.cat([x, x]), "concatenation"),
    "transpose": (lambda m, x: x.transpose(1, 2), "transpose"),
    "view": (lambda m, x: x.view(2, 3), "reshape"),
    "flatten": (lambda m, x: torch.flatten(x, 1), "reshape"),
    "part": (lambda m, x: x[:, 0], "unknown"),
    "item": (lambda m, x: x.chunk(2)[0], "item"),
    "pool": (lambda m, x: F.avg_pool2d(x, 2), "average"),
    "softmax": (lambda m, x: x.softmax(1), "unknown"),
    "max": (lambda m, x: F.max_pool2d(x, 2), "unknown"),
    "norm": (lambda m, x: F.layer_norm(x, (4,)), "features"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    code, kind = FUNCTIONS[name]
    assert before(code).kind == kind


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


MODULES: list[tuple[nn.Module, Kind]] = [
    (nn.ReLU(), "elementwise"),
    (nn.PReLU(), "elementwise"),
    (nn.Softmax(1), "unknown"),
    (nn.GLU(), "unknown"),
    (nn.Dropout(0.1), "dropout"),
    (nn.Dropout2d(0.0), "identity"),
    (nn.Linear(2, 2), "linear"),
    (nn.ConvTranspose2d(2, 2, 1), "linear"),
    (nn.AdaptiveAvgPool2d(1), "average"),
    (nn.MaxPool2d(2), "unknown"),
    (nn.Flatten(), "reshape"),
    (nn.BatchNorm2d(2), "norm"),
    (nn.LSTM(2, 2), "features"),
    (nn.MultiheadAttention(2, 1), "features"),
    (nn.Embedding(2, 2), "features"),
    (nn.GroupNorm(1, 2), "unknown"),
    (Custom(), "unknown"),
]


@pytest.mark.parametrize(("module", "kind"), MODULES, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_modules(module: nn.Module, kind: Kind) -> None:
    assert before(lambda m, x: m.other(x), other=module).kind == kind


def test_the_probability_of_dropout() -> None:
    assert before(lambda m, x: m.other(x), other=nn.Dropout(0.1)).probability == 0.1
    assert before(lambda m, x: F.dropout(x, 0.3)).probability == 0.3
    assert before(lambda m, x: F.dropout(x)).probability == 0.5
    assert before(lambda m, x: F.dropout(x, 0.3, False)).probability == 0


def test_products() -> None:
    assert before(lambda m, x: m.other(x), other=nn.Linear(2, 2)).is_product
    assert before(lambda m, x: F.linear(x, m.other.weight), other=nn.Linear(2, 2)).is_product
    assert not before(lambda m, x: m.other(x), other=nn.Conv1d(2, 2, 1)).is_product
    assert not before(lambda m, x: x.relu()).is_product


def test_scales_of_channels() -> None:
    scaled = before(lambda m, x: x * m.other.weight, other=nn.BatchNorm1d(4))
    assert scaled.kind == "scale"
    assert one_a_channel(scaled, 4)
    assert not one_a_channel(scaled, 8)
    assert is_per_channel(nn.Conv2d(4, 4, 1, groups=4))
    assert not any(
        map(is_per_channel, (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1, groups=4), None))
    )
