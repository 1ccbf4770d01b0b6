"""Differences of outputs, relative to their size."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.surgery.comparing import TOLERANCE, difference, outputs
from support.networks import Calls


def test_outputs_are_all_tensors_in_inference() -> None:
    model = Calls(lambda m, x: {"a": m.drop(x), "b": [x, 3]}, drop=nn.Dropout(0.9))
    a, b = outputs(model, torch.ones(1000))
    assert torch.equal(a, b)
    assert model.training


def test_the_worst_output_counts_relative_to_its_largest_value() -> None:
    a, b = torch.tensor([1.0, -100.0]), torch.tensor([2.0])
    error, tolerance = difference([a + torch.tensor([1.0, 0]), b * 1.5], [a, b])
    assert (error, tolerance) == (0.5, TOLERANCE[torch.float32])
    assert difference([a + torch.tensor([1.0, 0])], [a])[0] == 0.01


def test_the_coarsest_dtype_gives_the_tolerance() -> None:
    ones = torch.ones(2)
    assert difference([ones, ones.half()], [ones.double(), ones.half()])[1] == TOLERANCE[torch.float16]


def test_what_is_not_finite_is_infinitely_wrong() -> None:
    ones = torch.ones(2)
    assert difference([ones * float("nan")], [ones])[0] == float("inf")
    assert difference([ones], [ones * float("inf")])[0] == float("inf")


def test_zeros_and_integers() -> None:
    zeros = torch.zeros(2)
    assert (
        difference(
            [zeros, torch.ones(1, dtype=torch.int64), zeros[:0]], [zeros, torch.zeros(1, dtype=torch.int64), zeros[:0]]
        )[0]
        == 0
    )
    assert difference([zeros + 1], [zeros])[0] > 1
