"""MODEL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchnorm.errors import UsageError
from batchnorm.loading.model import load_model

CODE = """
from torch import nn
def net(width=3):
    return nn.Linear(2, width)
def needs(width):
    return nn.Linear(2, width)
def nothing():
    pass
ready = net()
"""


@pytest.fixture(autouse=True)
def code(project: Path) -> None:
    (project / "net.py").write_text(CODE)


def test_the_model_that_the_callable_returns() -> None:
    model = load_model("net.py:net")
    assert isinstance(model, torch.nn.Linear)
    assert model.weight.shape == (3, 2)


def test_with_weights(project: Path) -> None:
    torch.save({"weight": torch.full((3, 2), 7.0), "bias": torch.zeros(3)}, "w.pt")
    assert load_model("net.py:net", Path("w.pt")).weight.eq(7).all()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("needs", "net.py:needs raised TypeError: needs() missing 1 required positional argument: 'width'"),
        ("nothing", "net.py:nothing returned NoneType; MODEL must return a torch.nn.Module"),
        ("ready", "which is a model already; it must be a callable that returns one"),
        ("nn", "got MODEL net.py:nn; it must be callable"),
    ],
)
def test_no_model(name: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(f"net.py:{name}")
    assert part in str(caught.value)
