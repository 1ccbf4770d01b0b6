"""How far statistics scatter."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2

from batchnorm.diagnosis.noise import (
    chi_square_quantile,
    difference,
    rms,
    samples_of_a_batch,
    share_of_samples,
    values_in_effect,
)
from batchnorm.diagnosis.observation import Input, ObservedLayer
from batchnorm.moments import Moments
from diagnosis.observed import batches_of, draw, observe

EMPTY = ObservedLayer(Input((1, 1), torch.float32, False, 1))


def seen(x: torch.Tensor, size: int = 16) -> ObservedLayer:
    norm = torch.nn.BatchNorm2d(x.shape[1]) if x.dim() == 4 else torch.nn.BatchNorm1d(x.shape[1])
    return observe(norm, batches_of(x, size), recalibrated=False).layers[""]


def test_a_difference_in_units_of_the_first() -> None:
    a, b = Moments.of(draw(64, 3)), Moments.of(4 * draw(64, 3) + 1)
    shift, log_ratio = difference(a, b, 0.0)
    assert torch.allclose(shift, (b.mean - a.mean) / a.std())
    assert torch.allclose(log_ratio, torch.full((3,), 2 * torch.tensor(4.0).log(), dtype=torch.float64), atol=1e-5)
    assert rms(torch.tensor([3.0, -4.0])) == pytest.approx(12.5**0.5)
    assert rms(torch.tensor([])) == 0


def test_the_share_of_samples() -> None:
    assert share_of_samples(seen(draw(512, 4))) == pytest.approx(1)
    assert share_of_samples(seen(draw(512, 4, 4, 4))) == pytest.approx(1 / 16, rel=0.1)
    both = seen(draw(512, 4, 1, 1) + draw(512, 4, 4, 4, seed=1))
    assert share_of_samples(both) == pytest.approx((1 + 1 / 16) / 2, rel=0.1)
    assert values_in_effect(both, 8) == pytest.approx(8 / ((1 + 1 / 16) / 2), rel=0.1)


def test_what_cannot_be_told() -> None:
    assert share_of_samples(EMPTY) is None
    assert share_of_samples(seen(torch.ones(8, 3))) is None
    assert values_in_effect(EMPTY, 8) is None


def test_samples_of_a_batch() -> None:
    assert samples_of_a_batch(EMPTY) == 0
    assert samples_of_a_batch(seen(draw(67, 3))) == 16


@pytest.mark.parametrize("degrees", [1, 3, 10, 100])
@pytest.mark.parametrize("probability", [0.99, 0.9999, 1 - 1e-6])
def test_quantiles(probability: float, degrees: int) -> None:
    """Hardly ever too small, so that no alarm is due to the approximation; too large where degrees are few."""
    exact = chi2.ppf(probability, degrees)
    assert 0.99 * exact <= chi_square_quantile(probability, degrees) <= (1 + 0.2 / degrees**0.5) * exact
