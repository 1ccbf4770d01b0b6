"""What an input and a recipe have to fit, and what the errors say to do about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from batchnorm import errors
from batchnorm.kernels import reference
from batchnorm.recipe import Recipe, check, check_activation, check_virtual_batch_size

X = torch.randn(2, 3, 4)


def recipe(**changes: Any) -> Recipe:
    options: dict[str, Any] = {"weight": None, "bias": None, "residual": None, "eps": 1e-5, "channel_dim": 1}
    return Recipe(**(options | {"activation": None} | changes))


@pytest.mark.parametrize(("channel_dim", "channels"), [(0, 2), (1, 3), (2, 4), (-1, 4), (-3, 2)])
def test_it_returns_the_number_of_channels(channel_dim: int, channels: int) -> None:
    assert check(X, recipe(channel_dim=channel_dim)) == channels


def test_everything_that_fits() -> None:
    full = recipe(weight=torch.ones(3), bias=torch.ones(3, dtype=torch.float64), residual=X.clone(), activation="relu")
    assert check(X, full) == 3
    assert check(X.half(), full._replace(residual=X.half())) == 3


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 3, 0)])
def test_an_empty_input_of_any_rank(shape: tuple[int, ...]) -> None:
    assert check(torch.zeros(shape), recipe()) == (0 if len(shape) < 2 else 3)


# The received value, the rule and the remedy of each error. tests/test_functional.py holds when each one is raised.
MESSAGES: dict[str, tuple[Any, dict[str, Any], type[errors.BatchNormError], str]] = {
    "dtype": (X.long(), {}, errors.DTypeError, r"dtype torch.int64; .* needs a floating dtype. Convert .* x.float\(\)"),
    "rank": (X[0, 0], {}, errors.ShapeError, r"rank 1; .* needs at least 2 dimensions.* x.unsqueeze\(0\)"),
    "dimension": (X, {"channel_dim": -4}, errors.ShapeError, r"=-4 .* rank 3; it must lie in \[-3, 2\]. Use 1 .* -1"),
    "weight": (X, {"weight": X[0, 0]}, errors.ShapeError, r"shape \(4,\) .* 3 channels; .* \(3,\). Check num_features"),
    "bias": (X, {"bias": X[0, 0]}, errors.ShapeError, r"got bias of .* it must have shape \(3,\). .* channel_dim"),
    "residual": (X, {"residual": X[0]}, errors.ShapeError, r"\(3, 4\) .* \(2, 3, 4\); both .* equal. Expand or crop"),
    "half residual": (X, {"residual": X.half()}, errors.DTypeError, r"float16 .*float32; both .* equal. .*with .to"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_an_error_says_what_came_what_the_rule_is_and_what_to_do(case: str) -> None:
    x, changes, error, message = MESSAGES[case]
    with pytest.raises(error, match=message):
        check(x, recipe(**changes))


def test_every_activation_is_one_of_torchs() -> None:
    for name in reference.ACTIVATIONS:
        check_activation(name)
        assert callable(getattr(F, name))
    check_activation(None)


@pytest.mark.parametrize("name", ["tanh", "ReLU", ""])
def test_an_unknown_activation_is_shown_all_that_there_are(name: str) -> None:
    every = '"relu", "leaky_relu", "silu", "gelu", "hardswish", "elu" or None'
    with pytest.raises(errors.OptionError, match=f"got activation='{name}'; it must be one of {every}$"):
        check_activation(name)


def test_a_virtual_batch_size_is_a_positive_number_of_samples() -> None:
    for size in (None, 1, 2, 10**9):
        check_virtual_batch_size(size)
    for bad in (0, -1, -32):
        with pytest.raises(errors.OptionError, match=f"got virtual_batch_size={bad}; .* positive number .* or None"):
            check_virtual_batch_size(bad)
