"""LOSS on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.errors import UsageError
from batchnorm.loading.loss import load_loss

CODE = """
import torch
def squares(output, target):
    return ((output - target) ** 2).mean()
class Halved(torch.nn.Module):
    def forward(self, output, target):
        return squares(output, target) / 2
class Greedy(torch.nn.Module):
    def __init__(self, more):
        super().__init__()
def failing(output, target):
    raise LookupError("no such class")
number = 3
"""
X, Y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])


@pytest.fixture(autouse=True)
def code(project: Path) -> None:
    (project / "mine.py").write_text(CODE)


@pytest.mark.parametrize(
    ("reference", "value"),
    [("mse_loss", 2.0), ("l1_loss", 1.0), ("mine.py:squares", 2.0), ("mine:Halved", 1.0), ("torch.nn:L1Loss", 1.0)],
)
def test_what_a_name_stands_for(reference: str, value: float) -> None:
    assert float(load_loss(reference)(X, Y)) == value


def test_gradients_pass() -> None:
    x = X.clone().requires_grad_()
    load_loss("mse_loss")(x, Y).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, X - Y)


@pytest.mark.parametrize("name", ["crossentropy", "", "_Reduction", "Tensor.__name__", "nn.mse_loss"])
def test_what_is_no_loss(name: str) -> None:
    with pytest.raises(UsageError, match=r"got LOSS .*; it must be a function of torch\.nn\.functional, such as cross"):
        load_loss(name)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("mine.py:number", "it must be callable, and is of type int"),
        ("mine.py:nothing", "has no nothing"),
        ("mine:Greedy", "mine:Greedy raised TypeError: .*more"),
    ],
)
def test_wrong_references(reference: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_loss(reference)


def test_what_it_raises_names_it() -> None:
    with pytest.raises(UsageError, match=r"^mine\.py:failing raised LookupError: .*no such class.*mine\.py, line 12"):
        load_loss("mine.py:failing")(X, Y)
    assert not isinstance(load_loss("cross_entropy"), nn.Module)
