"""What a layer has seen, in any parts and order, and how much it is worth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.call import Call
from batchnorm.moments import Moments
from batchnorm.population.seen import Seen, samples_of
from support import oracle, tolerances
from support.comparison import close


def nothing() -> Seen:
    return Seen.nothing(3, torch.device("cpu"))


def joined(parts: list[Tensor], decay: float | None = None) -> Seen:
    seen = nothing()
    for x in parts:
        seen = seen.join(Moments.of(x), len(x), decay)
    return seen


def data(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 20


@st.composite
def splits(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """Samples, and the same in random parts and order, empty parts among them."""
    x = data(draw(st.integers(2, 20)), draw(st.integers(0, 99)))
    cuts = sorted(draw(st.lists(st.integers(0, len(x)), max_size=6)))
    parts = [x[a:b] for a, b in itertools.pairwise([0, *cuts, len(x)])]
    return x, draw(st.permutations(parts))


@given(splits(), st.sampled_from([0.0, 0.5, 16.0]))
def test_the_result_depends_on_no_split_and_no_order(drawn: tuple[Tensor, list[Tensor]], prior: float) -> None:
    x, parts = drawn
    mean, var = torch.tensor([0.0, 20.0, -3.0]).double(), torch.tensor([1.0, 9.0, 0.0]).double()
    n, mean_t, m2 = oracle.moments(x.double().numpy())
    share = prior / (prior + len(x))
    expected_mean = share * mean.numpy() + (1 - share) * mean_t
    expected = share * var.numpy() + (1 - share) * m2 / n + share * (1 - share) * (mean.numpy() - mean_t) ** 2
    for seen in (joined(parts), Seen.of_batches([Moments.of(part) for part in parts], len(x))):
        new = seen.joined_with(mean, var, prior)
        assert seen.samples == len(x)
        assert seen.batches == sum(len(part) > 0 for part in parts)
        assert seen.weight(prior) == pytest.approx(1 - share)
        close(new.mean, expected_mean, tolerances.STATISTIC)
        close(new.var(), expected, tolerances.STATISTIC, relative=tolerances.STATISTIC)
        assert float(new.count) == pytest.approx(n + prior * 4)


def test_with_nothing_seen_there_is_nothing() -> None:
    assert nothing().joined_with(torch.ones(3).double(), torch.ones(3).double(), 16).count == 0
    assert nothing().weight(0) == nothing().effective == 0


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_decay_is_a_weight_for_each_sample_that_came_later(decay: float) -> None:
    parts = list(data(14).split([5, 1, 8]))
    seen = joined(parts, decay)
    ages = torch.tensor([9] * 5 + [8] + [0] * 8)
    weights = torch.full((14,), decay).double() ** ages
    n, mean, m2 = oracle.moments(torch.cat(parts).double().numpy(), 1, weights[:, None].expand(14, 4).numpy())
    assert seen.samples == pytest.approx(float(weights.sum()))
    assert seen.count == pytest.approx(n)
    close(seen.mean, mean, tolerances.STATISTIC)
    close(seen.m2, m2, relative=tolerances.STATISTIC)


def test_inf_and_nan_are_left_out() -> None:
    x = data(8)
    bad = x[:2].clone()
    bad[0, 1] = float("nan")
    seen = nothing().join(Moments.of(bad), 2, 0.5)
    assert (seen.refused, seen.batches, seen.samples) == (1, 0, 0)
    seen = seen.join(Moments.of(x), 8, 0.5).join(Moments.of(bad), 2, 0.5)
    assert (seen.refused, seen.batches, seen.samples) == (2, 1, 8)
    assert torch.equal(seen.mean, Moments.of(x).mean)


# --- what it is worth -----------------------------------------------------------------------------------------------


def test_of_independent_values_each_counts() -> None:
    worth = [joined(list(torch.randn(400, 3).split(20))).effective for _ in range(10)]
    assert 300 < np.mean(worth) <= 400


def test_what_comes_together_counts_for_less() -> None:
    """Twenty batches, each of twenty values around a mean of its own."""
    parts = [torch.randn(20, 3) * 0.1 + torch.randn(1, 3) for _ in range(20)]
    assert 10 < joined(parts).effective < 40
    # As Moments of each part have it, the between-batch variance by hand.
    means, whole = torch.stack([part.mean(0) for part in parts]).double(), torch.cat(parts).double()
    between = 20 * (means - whole.mean(0)).square().sum(0)
    ratio = (between / whole.var(0, correction=0)).mean() / 19
    assert joined(parts).effective == pytest.approx(400 / float(ratio), rel=tolerances.PARTS)
    assert Seen.of_batches([Moments.of(x) for x in parts], 400).effective == pytest.approx(joined(parts).effective)


def test_one_batch_counts_its_samples() -> None:
    assert joined([data(7)]).effective == 7
    assert joined([data(7), data(5)], decay=0.0).effective == 5
    assert joined([torch.ones(4, 3)] * 3).effective == 12  # without variance nothing scatters


def test_of_decayed_batches_fewer_count() -> None:
    """Values of weights w are worth (Σ w)^2 / Σ w^2 independent ones: Kish, "Survey Sampling", 1965."""
    decay, size = 0.9, 10
    worth = [joined(list(torch.randn(2000, 3).split(size)), decay).effective for _ in range(20)]
    kept = decay**size
    expected = size * (1 / (1 - kept)) ** 2 * (1 - kept**2)
    assert math.isclose(np.mean(worth), expected, rel_tol=0.3)
    assert max(worth) <= expected * (1 + 1e-6)


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "channel_dim", "mask", "samples"),
    [
        ((5, 3, 4), 1, None, 5),
        ((5, 4, 3), -1, None, 5),
        ((3, 5, 4), 0, None, 5),
        ((0, 3), 1, None, 0),
        ((5, 3), 1, torch.tensor([1, 0, 0.5, 0, 2]), 3),
        ((3, 3, 4), 1, torch.arange(4) < torch.tensor([[4], [0], [1]]), 2),
        ((3, 3, 4), 1, (torch.arange(4) < 2)[None], 3),
        ((3, 3, 4), 1, torch.zeros(1, 4), 0),
    ],
)
def test_samples_are_rows_that_count(
    shape: tuple[int, ...], channel_dim: int, mask: Tensor | None, samples: int
) -> None:
    assert samples_of(Call(torch.randn(shape), mask=mask, channel_dim=channel_dim)) == samples
