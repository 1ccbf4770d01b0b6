"""What methods share: forward passes, progress, checks of moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.errors import CountError, NonFiniteError
from batchnorm.moments import Moments
from batchnorm.population.context import LayerCall, Progress, check_finite, population
from batchnorm.population.layers import select_layers

(LAYER,), _ = select_layers(nn.BatchNorm1d(2))


def test_progress() -> None:
    told: list[tuple[int, int | None]] = []
    progress = Progress(lambda *done: told.append(done), None)
    progress.done = 3
    progress.tell()
    progress.batches = 4
    progress.tell()
    progress.calls = 2
    progress.tell()
    assert told == [(3, None), (3, None), (3, 8)]
    Progress(None, 3).tell()


def test_population_is_biased() -> None:
    x = torch.randn(5, 2, dtype=torch.float64)
    new = population(LAYER, Moments.of(x))
    assert new is not None
    assert new.count == 5
    torch.testing.assert_close(new.mean, x.mean(0))
    torch.testing.assert_close(new.var, x.var(0, correction=0))


def test_population_of_nothing_and_of_one() -> None:
    assert population(LAYER, Moments.empty(2)) is None
    with pytest.raises(CountError, match='layer "the model itself": got one value'):
        population(LAYER, Moments.of(torch.zeros(1, 2)))
    weighted = Moments.of(torch.randn(3, 2), mask=torch.tensor([0.5, 0.25, 0.25]))
    assert population(LAYER, weighted) is not None  # a count of 1.0 is three values here


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_check_finite(bad: float, rows: int) -> None:
    x = torch.randn(rows, 2)
    good = LayerCall(LAYER, Moments.of(x), 0)
    check_finite([good])
    x = x.clone()
    x[rows // 2, 1] = bad
    with pytest.raises(NonFiniteError, match=r'layer "the model itself": .* in batch 5;'):
        check_finite([good, LayerCall(LAYER, LAYER.moments((x,), {}), 5)])
