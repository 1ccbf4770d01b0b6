"""What is close, and what the message says of what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from support import tolerances
from support.comparison import close

X = torch.tensor([[1.0, -2.0], [0.0, 100.0]])


def off(by: float, at: tuple[int, int] = (1, 1), dtype: torch.dtype = torch.float64) -> torch.Tensor:
    moved = X.to(dtype)
    moved[at] += by
    return moved


@pytest.mark.parametrize(
    ("error", "bounds"),
    [
        (1.0, {"tolerance": 0.01}),  # 0.01 * (1 + 100)
        (1.0, {"relative": 0.01}),
        (1.0, {"absolute": 1.0}),
        (1.0, {"absolute": np.array([[0.0, 0.0], [0.0, 1.0]])}),
        (1.5, {"relative": 0.01, "absolute": 0.5}),
    ],
    ids=str,
)
def test_up_to_the_bound(error: float, bounds: dict[str, Any]) -> None:
    close(off(error), X.double(), **bounds)
    close(off(-error), X.double().numpy(), **bounds)
    with pytest.raises(AssertionError, match=r"1 of 4 values differ, most at \(1, 1\)"):
        close(off(1.02 * error), X.double(), **bounds)


def test_the_message_names_the_worst() -> None:
    actual = off(0.5)
    actual[0, 1] = 7.0
    message = r"dx: 2 of 4 values differ, most at \(0, 1\): got 7\.0 where -2\.0 is expected, off by 9 with"
    with pytest.raises(AssertionError, match=message):
        close(actual, X.double(), 1e-6, name="dx")


@pytest.mark.parametrize("dtype", tolerances.AGAINST_TORCH)
def test_two_computations_in_one_dtype_without_a_bound(dtype: torch.dtype) -> None:
    _, absolute = tolerances.AGAINST_TORCH[dtype]
    zeros = torch.zeros(3, dtype=dtype)
    close(zeros + 0.9 * absolute, zeros)
    with pytest.raises(AssertionError, match="3 of 3"):
        close(zeros + 1.1 * absolute, zeros)


def test_integers_are_exact() -> None:
    close(torch.tensor([2**40]), torch.tensor([2**40]))
    with pytest.raises(AssertionError):
        close(torch.tensor([2**40 + 1]), torch.tensor([2**40]))


@pytest.mark.parametrize("dtype", tolerances.ONE_ROUNDING)
def test_one_rounding_to_the_dtype(dtype: torch.dtype) -> None:
    exact = np.linspace(0.1, 5, 99)
    once = torch.from_numpy(exact).to(dtype)
    close(once, exact, rounded=True)
    with pytest.raises(AssertionError):
        close(once * (1 + 4 * torch.finfo(dtype).eps), exact + 1e-9, rounded=True)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (X, X.double(), "float32.* where .*float64"),
        (X, X.flatten(), r"got shape \(2, 2\) where \(4,\) is expected"),
        (X, X[:, :1].numpy(), r"got shape \(2, 2\) where \(2, 1\) is expected"),
        (None, X, "got None where"),
        (X, None, "where None is expected"),
        (off(float("nan")), off(float("nan")), "got nan"),
        (off(float("inf")), X.double(), "inf"),
        (X.double(), off(float("inf")), "inf"),
        (off(float("-inf")), off(float("inf")), "inf"),
    ],
)
def test_what_is_close_to_nothing(actual: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        close(actual, expected, 0.5)


def test_what_is_close_to_itself() -> None:
    close(None, None)
    close(off(float("inf")), off(float("inf")), 1e-6)
    close(torch.zeros(0, 3), torch.zeros(0, 3))
    close(1.0, 1.0)
    close(1.0 + 1e-9, 1.0, 1e-6)
