"""Commits by the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels import reference
from batchnorm.kernels.triton import operations
from support import tolerances
from support.comparison import close

COUNTERS = [torch.int64, torch.int32, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", tolerances.ONE_ROUNDING)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("count", [0, 1, 7, 7.5])
@pytest.mark.parametrize("batches", [None, 0, 4])
def test_commit(dtype: torch.dtype, momentum: float | None, count: float, batches: int | None) -> None:
    mean, m2 = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    mean[1] = float("inf")
    m2[3] = 1e300  # not finite once rounded, but in float64
    found = []
    for implementation in (operations, reference):
        generator = torch.Generator().manual_seed(0)
        running = torch.randn(5, generator=generator).to(dtype), torch.rand(5, generator=generator).to(dtype)
        tracked = None if batches is None else torch.tensor(batches)
        skipped = torch.zeros(5, dtype=torch.int64)
        implementation.commit(*running, tracked, skipped, torch.tensor(count), mean, m2, momentum)
        found.append([*running, tracked, skipped])
    relative, absolute = tolerances.ONE_ROUNDING[dtype]
    for actual, expected in zip(*found, strict=True):
        close(actual, expected, relative=2 * relative, absolute=max(absolute, tolerances.BLEND))


@pytest.mark.parametrize("dtype", COUNTERS)
@pytest.mark.parametrize("loaded", [False, True])
def test_the_average_counts_loaded_statistics(dtype: torch.dtype, loaded: bool) -> None:
    found = []
    for implementation in (operations, reference):
        running, tracked = (torch.zeros(3), torch.ones(3)), torch.tensor(0, dtype=dtype)
        running[1][2] += loaded
        mean, m2 = torch.arange(3).double(), torch.ones(3).double()
        implementation.commit(*running, tracked, None, torch.tensor(3), mean, m2, None)
        found.append([*running, tracked])
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)
