"""What a call has to fit, and what the errors say to do about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchnorm import errors
from batchnorm.call import Call, check_sync, check_virtual_batch_size

X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(("channel_dim", "channels"), [(0, 2), (1, 3), (2, 4), (-1, 4), (-3, 2)])
def test_it_returns_the_number_of_channels(channel_dim: int, channels: int) -> None:
    call = Call(X, channel_dim=channel_dim)
    assert call.num_channels == channels
    assert call.channel_dim == channel_dim % 3
    assert call.count == X.numel() // channels


def test_everything_that_fits() -> None:
    weight, bias = torch.ones(3), torch.ones(3, dtype=torch.float64)
    assert Call(X, weight, bias, X.clone(), activation="relu").num_channels == 3
    assert Call(X.half(), weight, bias, X.half(), activation="relu").num_channels == 3


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 3, 0)])
def test_an_empty_input_of_any_rank(shape: tuple[int, ...]) -> None:
    assert Call(torch.zeros(shape)).num_channels == (0 if len(shape) < 2 else 3)


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
        Call(x, **changes)


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (torch.ones(2), (2, 4)),
        (torch.ones(1, 4), (2, 4)),
        (torch.ones(2, 4, dtype=torch.bool), (2, 4)),
        (torch.ones(2, 4, dtype=torch.int64), (2, 4)),
    ],
    ids=["samples", "broadcast", "bool", "integer"],
)
def test_a_mask_becomes_one_value_for_each_position(mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    made = Call(X, mask=mask).mask
    assert made is not None
    assert made.shape == shape
    assert made.dtype == (torch.float64 if mask.dtype == torch.int64 else mask.dtype)


def test_a_changed_call_is_another() -> None:
    call = Call(X, channel_dim=-1)
    changed = call.replace(x=X.half(), num_channels=7)
    assert (changed.x.dtype, changed.num_channels, changed.channel_dim) == (torch.float16, 7, 2)
    assert (call.x.dtype, call.num_channels) == (torch.float32, 4)


def test_correction_is_a_scale_and_shift_before_weight_and_bias() -> None:
    r, d, weight, bias = torch.rand(4, 3).unbind()
    normalised = torch.randn(3)
    for w, b in ((None, None), (weight, None), (None, bias), (weight, bias)):
        call = Call(X, w, b).corrected(r, d)
        assert call.weight is not None
        assert call.bias is not None
        expected = (normalised * r + d) * (1 if w is None else w) + (0 if b is None else b)
        torch.testing.assert_close(normalised * call.weight + call.bias, expected)


def test_a_virtual_batch_size_is_a_positive_number_of_samples() -> None:
    for size in (None, 1, 2, 10**9):
        check_virtual_batch_size(size)
    for bad in (0, -1, -32):
        with pytest.raises(errors.OptionError, match=f"got virtual_batch_size={bad}; .* positive number .* or None"):
            check_virtual_batch_size(bad)


def test_a_group_needs_sync_and_sync_no_ghost_batches() -> None:
    check_sync(True, object(), None)
    check_sync(False, None, 4)
    with pytest.raises(errors.OptionError, match=r"got a process_group without sync=True; .* Pass both, or none"):
        check_sync(False, object(), None)
    with pytest.raises(errors.OptionError, match=r"got virtual_batch_size=4 with .* Leave one of the two out"):
        check_sync(True, None, 4)
