"""Whether batches are random draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm.diagnosis.permutation import between_batches
from diagnosis.observed import draw


def planted(share: float, *, samples: int = 320, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Batches whose means have so much of the variance."""
    batch_of = torch.arange(samples) // size
    means = draw(samples // size, 8, seed=seed + 1000)[batch_of]
    return (share**0.5 * means + (1 - share) ** 0.5 * draw(samples, 8, seed=seed)).double(), batch_of


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_the_share_that_was_planted(share: float) -> None:
    x, batch_of = planted(share)
    (found,) = between_batches([x], batch_of)
    assert found.share == pytest.approx(share, abs=0.12)
    assert found.significant


def test_the_share_is_an_intraclass_correlation() -> None:
    """One channel, batches of one size, by NumPy from its definition."""
    x, batch_of = planted(0.3)
    values = x[:, 0].numpy().reshape(-1, 16)
    between = 16 * values.mean(1).var(ddof=1)
    within = values.var(1, ddof=1).mean()
    (found,) = between_batches([x[:, :1]], batch_of)
    assert found.share == pytest.approx((between - within) / (between + 15 * within), rel=1e-4)


def test_the_score_is_that_of_permutations() -> None:
    x, batch_of = planted(0.1)
    values, generator = x.numpy() / x.numpy().std(0), np.random.default_rng(0)
    values -= values.mean(0)
    squares = [
        (16 * np.square(values[order].reshape(-1, 16, 8).mean(1)).sum())
        for order in [np.arange(320), *(generator.permutation(320) for _ in range(2000))]
    ]
    (found,) = between_batches([x], batch_of, permutations=2000)
    assert found.score == pytest.approx((squares[0] - np.mean(squares[1:])) / np.std(squares[1:]), rel=0.1)


def test_random_draws_are_not_significant() -> None:
    alarms = 0
    for seed in range(40):
        layers = [planted(0.0, seed=10 * seed + i)[0] for i in range(3)]
        alarms += any(one.significant for one in between_batches(layers, torch.arange(320) // 16, permutations=99))
    assert alarms <= 3  # one in a hundred


def test_one_layer_of_several() -> None:
    x, batch_of = planted(0.3)
    found = between_batches([planted(0.0, seed=1)[0], x, torch.ones(320, 4)], batch_of)
    assert [one.significant for one in found] == [False, True, False]


def test_what_does_not_matter_is_not_permuted() -> None:
    x, batch_of = planted(0.1)
    (found,) = between_batches([x], batch_of, least=0.5)
    assert found.score == 0
    assert not found.significant
    assert found.share == pytest.approx(0.1, abs=0.1)


def test_batches_of_several_sizes_out_of_order() -> None:
    x, batch_of = planted(0.5)
    keep, order = batch_of != 3, torch.randperm(320, generator=torch.Generator().manual_seed(0))
    keep[::7] = False
    (first,) = between_batches([x[keep]], batch_of[keep])
    order = order[keep[order]]
    (second,) = between_batches([x[order]], batch_of[order])
    assert first.significant
    assert second.share == pytest.approx(first.share)


def test_nothing_to_compare() -> None:
    assert between_batches([], torch.arange(8)) == []
    for batch_of in (torch.zeros(8, dtype=torch.int64), torch.arange(8)):
        (found,) = between_batches([draw(8, 3)], batch_of)
        assert not found.significant
