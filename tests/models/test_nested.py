"""Containers of every kind: what is in them, changed in copies, compared."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.models.nested import leaves, map_leaves, map_tensors, same_structure, tensors

Pair = namedtuple("Pair", ["x", "y"])
X, Y = torch.arange(12).view(6, 2), torch.arange(6)


@dataclass
class Output:
    x: Tensor
    y: Tensor


pytree.register_dataclass(Output)

KINDS = [
    X,
    (X, Y),
    [X, Y],
    Pair(X, Y),
    {"x": X, "y": Y},
    OrderedDict(x=X, y=Y),
    UserDict({"x": X, "y": (Y, [X])}),
    (X, "text", None, 3),
    deque([X, Y]),
    Output(X, Y),
    torch.return_types.max((X, Y)),
]


@pytest.mark.parametrize("value", KINDS, ids=lambda value: type(value).__name__)
def test_kinds(value: Any) -> None:
    assert next(tensors(value)) is X
    doubled = map_tensors(value, lambda t: t * 2)
    assert type(doubled) is type(value)
    assert next(tensors(value)) is X
    assert all(torch.equal(a, 2 * b) for a, b in zip(tensors(doubled), tensors(value), strict=True))
    assert same_structure(value, doubled)


def test_leaves_in_order() -> None:
    value = [1, {"b": (2, None), "a": "text"}, [], deque([3])]
    assert list(leaves(value)) == [1, 2, None, "text", 3]
    assert list(leaves(5)) == [5]
    assert map_leaves(value, str) == ["1", {"b": ("2", "None"), "a": "text"}, [], deque(["3"])]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ([3, {"a": (4, 5)}], True),
        ([X, {"a": (None, "text")}], True),
        ((1, {"a": (2, 3)}), False),
        ([1, {"b": (2, 3)}], False),
        ([1, {"a": (2, 3, 4)}], False),
        ([1, {"a": 2}], False),
        ([1, OrderedDict(a=(2, 3))], False),
        (1, False),
    ],
)
def test_structures(other: object, same: bool) -> None:
    assert same_structure([1, {"a": (2, 3)}], other) is same
    assert same_structure(other, [1, {"a": (2, 3)}]) is same
