"""The reference against the oracle: every operation, activation and dtype."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels import reference
from support import oracle, tolerances
from support.comparison import close
from support.samples import LAYOUTS, Sample

EPS = 1e-5
SAMPLES = [
    Sample(LAYOUTS[7], activation, residual, dtype, affine)
    for activation, residual, dtype, affine in itertools.product(
        (None, *ACTIVATIONS), (False, True), tolerances.ONE_ROUNDING, (True, False)
    )
] + [Sample(layout, "relu", True) for layout in LAYOUTS]


def check(actual: Tensor, expected: oracle.Array, dtype: torch.dtype = torch.float64) -> None:
    """Within one rounding to `dtype`, and the reference's own error before it: a few hundred additions in float64."""
    assert actual.dtype == dtype
    own, _ = tolerances.ONE_ROUNDING[torch.float64]
    close(actual, expected, rounded=True, absolute=own * (1 + np.abs(expected).max(initial=0)) * 100)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_operations_are_the_oracles(sample: Sample) -> None:
    t = sample.tensors()
    o = sample.oracle_inputs(t)
    options = (EPS, sample.layout.channel_dim, sample.activation)
    x, dy, residual, weight, bias = (t[key] for key in ("x", "dy", "residual", "weight", "bias"))
    affine = (weight, bias, residual, *options)
    arrays = (o["weight"], o["bias"], o["residual"], *options)
    y, mean, m2 = oracle.forward(o["x"], *arrays)
    n = o["x"].size / sample.layout.channels
    var = m2 / n

    for actual_y, actual_count, actual_mean, actual_m2 in [
        reference.forward(x, *affine),
        (reference.normalize(x, *map(torch.from_numpy, (mean, var)), *affine), *reference.batch_moments(x, options[1])),
    ]:
        check(actual_y, y, sample.dtype)
        assert torch.equal(actual_count, torch.tensor(int(n)))
        check(actual_mean, mean)
        check(actual_m2, m2)

    statistics = (torch.from_numpy(mean), torch.from_numpy(var))
    for constants in (False, True):
        dx, dz, dweight, dbias = oracle.backward(o["dy"], o["x"], mean, var, *arrays, constants=constants)
        sums = reference.backward_sums(dy, x, *statistics, *affine)
        means = (None, None) if constants else (sums[0] / n, sums[1] / n)
        results = [(*reference.backward_input(dy, x, *statistics, *affine, *means), *sums)]
        if not constants:
            moments = (torch.tensor(int(n)), torch.from_numpy(mean), torch.from_numpy(m2))
            fused = reference.backward(dy, x, *moments, *affine)
            check(fused[0], dx, sample.dtype)
            for actual, expected, parameter in ((fused[1], dweight, weight), (fused[2], dbias, bias)):
                check(actual, expected, torch.float64 if parameter is None else parameter.dtype)
        for actual_dx, actual_dresidual, actual_dbias, actual_dweight in results:
            check(actual_dx, dx, sample.dtype)
            check(actual_dbias, dbias)
            check(actual_dweight, dweight)
            if sample.with_residual and sample.activation is not None:
                check(actual_dresidual, dz, sample.dtype)
            else:
                assert actual_dresidual.shape == (0,)


def test_no_values_no_statistics() -> None:
    count, mean, m2 = reference.batch_moments(torch.zeros(0, 3, 2), 1)
    assert count == 0
    assert mean.tolist() == m2.tolist() == [0, 0, 0]
