"""The reference against the oracle: every operation, activation and dtype."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import batchnorm
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


BOTH = pytest.mark.parametrize("implementation", [reference, torch.ops.batchnorm], ids=["reference", "native"])


@BOTH
def test_a_momentum_of_one_is_the_batchs_own(implementation: Any) -> None:
    running = torch.full((2,), 1e16), torch.full((2,), 1e16)
    mean, m2 = torch.tensor([1.0, -3.0]).double(), torch.tensor([3.0, 5.0]).double()
    implementation.commit(*running, None, None, torch.tensor(4), mean, m2, 1.0)
    assert running[0].tolist() == [1.0, -3.0]
    torch.testing.assert_close(running[1], torch.tensor([1.0, 5 / 3]))


@BOTH
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e60), (torch.float16, 1e7), (torch.bfloat16, 1e60)])
def test_what_the_buffers_cannot_hold_is_held_back(implementation: Any, dtype: torch.dtype, large: float) -> None:
    running, skips = (torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)), torch.zeros(3, dtype=torch.int64)
    mean, m2 = torch.tensor([1.0, large, 1.0]).double(), torch.tensor([2.0, 2.0, large]).double()
    implementation.commit(*running, None, skips, torch.tensor(2), mean, m2, 0.5)
    assert running[0].tolist() == [0.5, 0, 0]
    assert running[1].tolist() == [1.5, 1, 1]
    assert skips.tolist() == [0, 1, 1]


def test_an_input_beyond_the_buffers_leaves_them_finite() -> None:
    layer, x = batchnorm.BatchNorm1d(2), torch.randn(8, 2)
    layer(x * torch.tensor([1e22, 1.0]))
    layer(x)
    assert layer.running_var is not None
    assert layer.running_var.isfinite().all()
    assert layer.num_batches_skipped.tolist() == [1, 0]


@BOTH
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_any_number_counts_batches(
    implementation: Any, dtype: torch.dtype, shape: tuple[int, ...], momentum: float | None
) -> None:
    running, tracked = (torch.zeros(2), torch.ones(2)), torch.full(shape, 3, dtype=dtype)
    moments = torch.tensor(4), torch.ones(2).double(), torch.ones(2).double()
    implementation.commit(*running, tracked, None, *moments, momentum)
    assert torch.equal(tracked, torch.full(shape, 4, dtype=dtype))
    torch.testing.assert_close(running[0], torch.full((2,), 0.1 if momentum else 0.25))


WRONG: dict[str, dict[str, Tensor]] = {
    "running_mean": {"running_mean": torch.zeros(4)},
    "running_var": {"running_var": torch.ones(4)},
    "running_var ": {"running_var": torch.ones(3, dtype=torch.int64)},
    "running_var  ": {"running_var": torch.ones(1).expand(3)},
    "num_batches_tracked": {"num_batches_tracked": torch.zeros(2, dtype=torch.int64)},
    "num_batches_tracked ": {"num_batches_tracked": torch.zeros((), dtype=torch.bool)},
    "num_batches_skipped": {"num_batches_skipped": torch.zeros(4, dtype=torch.int64)},
    "num_batches_skipped ": {"num_batches_skipped": torch.zeros(3)},
    "num_batches_skipped  ": {"num_batches_skipped": torch.zeros(1, dtype=torch.int64).expand(3)},
    "count": {"count": torch.full((2,), 4)},
    "m2": {"m2": torch.ones(2).double()},
}


@BOTH
@pytest.mark.parametrize("name", WRONG)
def test_a_commit_that_does_not_fit_changes_nothing(implementation: Any, name: str) -> None:
    arguments = {
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "num_batches_tracked": torch.tensor(2),
        "num_batches_skipped": torch.zeros(3, dtype=torch.int64),
        "count": torch.tensor(4),
        "mean": torch.full((3,), float("nan"), dtype=torch.float64).index_fill_(0, torch.tensor([0]), 1.0),
        "m2": torch.ones(3).double(),
    } | WRONG[name]
    before = {key: value.clone() for key, value in arguments.items()}
    with pytest.raises(RuntimeError, match=f"got {name.strip()} "):
        implementation.commit(**arguments, momentum=0.5)
    for key, value in arguments.items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


@BOTH
def test_without_running_statistics_nothing_is_committed(implementation: Any) -> None:
    x, tracked = torch.randn(6, 3), torch.tensor(2)
    affine = (None, None, None, EPS, 1, "relu", None)
    for actual, expected in zip(
        implementation.forward_commit(x, *affine, None, None, tracked, None, 0.1),
        implementation.forward(x, *affine),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    assert tracked == 2
    for half in ((torch.zeros(3), None), (None, torch.ones(3))):
        with pytest.raises(RuntimeError, match="got running_mean without running_var"):
            implementation.forward_commit(x, *affine, *half, None, None, 0.1)
