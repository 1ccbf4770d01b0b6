"""Tables of several domains: what each sample uses, and the sums of each domain's samples."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels import tables
from support import tolerances
from support.comparison import close

DOMAIN = torch.tensor([1, 0, 1, 2])
SHAPES = {"(N, C)": ((4, 3), 1), "(C, N)": ((3, 4), 0), "(N, C, L)": ((4, 3, 5), 1), "(N, L, C)": ((4, 5, 3), 2)}


def of_sample(x: torch.Tensor, axis: int, sample: int) -> torch.Tensor:
    """A sample as (C, values)."""
    return x.select(1 if axis == 0 else 0, sample).movedim(max(axis - 1, 0), 0).reshape(3, -1)


@pytest.mark.parametrize("kind", SHAPES)
def test_each_sample_uses_its_domains_row(kind: str) -> None:
    shape, axis = SHAPES[kind]
    table = torch.arange(9.0).view(3, 3)
    whole = torch.zeros(shape) + tables.spread(table, len(shape), axis, DOMAIN)
    for sample, domain in enumerate(DOMAIN):
        values = of_sample(whole, axis, sample)
        assert torch.equal(values, table[domain].unsqueeze(1).expand_as(values))
    shared = tables.spread(table[0], len(shape), axis, DOMAIN)
    assert torch.equal(shared, tables.spread(table[0], len(shape), axis, None))


@pytest.mark.parametrize("kind", SHAPES)
def test_the_sums_are_those_of_each_domains_samples(kind: str) -> None:
    shape, axis = SHAPES[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums, counts = tables.summed(x, axis, DOMAIN, 4), tables.counted(x, axis, DOMAIN, 4)
    expected, count = torch.zeros(4, 3, dtype=torch.float64), [0] * 4
    for sample, domain in enumerate(DOMAIN.tolist()):
        values = of_sample(x, axis, sample)
        expected[domain] += values.sum(1)
        count[domain] += values.shape[1]
    close(sums, expected, tolerances.ASSOCIATIVITY)
    assert counts.tolist() == count
    close(tables.summed(x, axis, None, 1), expected.sum(0), tolerances.ASSOCIATIVITY)
    assert tables.counted(x, axis, None, 1) == sum(count)


def test_what_is_infinite_in_one_domain_stays_there() -> None:
    x = torch.tensor([[1.0], [float("inf")], [2.0], [float("nan")]])
    sums = tables.summed(x, 1, torch.tensor([0, 1, 0, 2]), 3)
    assert sums[0] == 3
    assert sums[1].isinf()
    assert sums[2].isnan()


def test_a_count_for_each_domain_stands_beside_its_row() -> None:
    table = torch.ones(2, 3)
    assert tables.beside(torch.tensor([1, 2]), table).shape == (2, 1)
    assert tables.beside(torch.tensor(2), table).shape == ()
    assert tables.beside(torch.tensor([1, 2, 3]), table[0]).shape == (3,)  # one for each channel


def test_the_gradient_of_a_parameter_that_domains_share_is_the_sum_of_theirs() -> None:
    sums = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert torch.equal(tables.gradient_of(torch.zeros(2), sums), torch.tensor([4.0, 6.0]))
    assert torch.equal(tables.gradient_of(torch.zeros(2, 2), sums), sums.float())
    assert tables.gradient_of(None, sums) is sums
