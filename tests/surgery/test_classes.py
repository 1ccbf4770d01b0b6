"""Instances of classes that are made at run time are copied and pickled by what the class was made of."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import torch
from torch import fx, nn

from batchnorm.surgery.classes import reduced_by


@functools.cache
def doubled(base: Any) -> Any:
    """A class on top of `base` whose forward gives twice as much."""
    members = {
        "__reduce_ex__": reduced_by(base, doubled, base),
        "forward": lambda self, x: 2 * base.forward(self, x),
    }
    return type(f"Doubled{base.__name__}", (base,), members)


def test_copies_and_pickles_are_of_the_same_class() -> None:
    made, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = 2 * made(x)
    made.__class__ = doubled(nn.Linear)
    for again in (copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert type(again) is doubled(nn.Linear)
        assert torch.equal(again(x), expected)
    assert copy.deepcopy(made).weight is not made.weight


def test_what_reduces_in_a_way_of_its_own_goes_on_to() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2)))
    base, own = type(traced), traced.__reduce_ex__(4)
    assert reduced_by(base, doubled, base)(traced, 4)[0] == own[0]
