"""A commit blends as it says, holds back what does not fit the buffers, and changes nothing that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm.kernels import reference

EPS = 1e-5
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
