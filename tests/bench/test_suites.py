from __future__ import annotations

import pytest
import torch

from batchnorm.bench import suites


@pytest.mark.parametrize("case", suites.cases("all"), ids=str)
def test_a_case_is_what_it_says(case: suites.Case) -> None:
    small = suites.Case(case.suite, (*(min(size, 5) for size in case.shape),), case.layout, case.dtype)
    x, dy, weight, bias = small.tensors()
    assert x.dtype == dy.dtype == suites.DTYPES[case.dtype]
    assert x.shape[small.channel_dim] == small.channels == weight.numel() == bias.numel()
    assert x.stride() == dy.stride()
    if case.layout in (suites.LAST, suites.AXIS) and small.channels > 1:
        assert x.stride(small.channel_dim) == 1


def test_suites_are_chosen_by_name() -> None:
    assert {case.suite for case in suites.cases("small")} == {"small"}
    assert {case.suite for case in suites.cases("all")} == set(suites.SHAPES)
    assert {case.dtype for case in suites.cases("odd", ("float32",))} == {"float32"}


def test_the_same_values_every_time() -> None:
    case = suites.cases("small")[0]
    for a, b in zip(case.tensors(), case.tensors(), strict=True):
        assert torch.equal(a, b)
