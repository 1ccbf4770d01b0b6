"""The laws of moments, by property: values against the oracle, never against another of our own results alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from batchnorm import Moments
from batchnorm.errors import CountError, OptionError, ShapeError
from support import oracle, tolerances

OFFSETS = st.sampled_from([0.0, 1.0, -300.0, 1e4, -1e6, 1e6])


@st.composite
def batches(draw: st.DrawFn, min_rows: int = 0) -> np.ndarray:
    """(N, C) float64 values of order 1 around an offset of up to 1e6."""
    rows, channels = draw(st.integers(min_rows, 40)), draw(st.integers(1, 5))
    values = draw(arrays(np.float64, (rows, channels), elements=st.floats(-3, 3, width=32)))
    return values + draw(OFFSETS)


def assert_is(m: Moments, x: np.ndarray, weights: np.ndarray | None = None) -> None:
    """`m` is the moments of x as the oracle computes them."""
    count, mean, m2 = oracle.moments(x, 1, weights)
    bound = tolerances.ASSOCIATIVITY * (1 + np.abs(x).max(initial=0))
    assert float(m.count) == pytest.approx(count, rel=tolerances.ASSOCIATIVITY)
    np.testing.assert_allclose(m.mean.numpy(), mean, rtol=0, atol=bound)
    # The rounding of the values' own offset enters every squared deviation once, times the deviation.
    np.testing.assert_allclose(m.m2.numpy(), m2, rtol=tolerances.ASSOCIATIVITY, atol=10 * bound * (1 + count))


@given(batches())
def test_of_is_the_oracles(x: np.ndarray) -> None:
    assert_is(Moments.of(torch.from_numpy(x)), x)


@given(batches())
def test_empty_is_the_identity_bit_for_bit(x: np.ndarray) -> None:
    m, empty = Moments.of(torch.from_numpy(x)), Moments.empty(x.shape[1])
    for joined in (m + empty, empty + m, sum([m], start=empty)):
        assert torch.equal(joined.count, m.count)
        assert torch.equal(joined.mean, m.mean)
        assert torch.equal(joined.m2, m.m2)


@given(batches(), st.data())
def test_any_partition_gives_one_answer(x: np.ndarray, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=6)))
    parts = [Moments.of(torch.from_numpy(part)) for part in np.split(x, cuts)]
    empty = Moments.empty(x.shape[1])
    order = data.draw(st.permutations(parts))
    assert_is(sum(parts, start=empty), x)
    assert_is(sum(order, start=empty), x)  # commutative
    right = empty
    for part in reversed(parts):
        right = part + right  # associative: grouped from the other end
    assert_is(right, x)


@given(batches(min_rows=1), st.floats(-5, 5, width=32), OFFSETS)
def test_scale_and_shift(x: np.ndarray, scale: float, shift: float) -> None:
    m = Moments.of(torch.from_numpy(x))
    moved = Moments(m.count, m.mean * scale + shift, m.m2 * scale**2)
    magnitude = 1 + np.abs(x).max() * abs(scale) + abs(shift)
    _, mean, m2 = oracle.moments(x * scale + shift)
    np.testing.assert_allclose(moved.mean.numpy(), mean, rtol=0, atol=tolerances.ASSOCIATIVITY * magnitude)
    bound = tolerances.ASSOCIATIVITY * magnitude * (1 + abs(scale)) * 100 * len(x)
    np.testing.assert_allclose(moved.m2.numpy(), m2, rtol=tolerances.SCALED_SQUARES, atol=bound)


@given(batches(), st.data())
def test_masked_is_selected(x: np.ndarray, data: st.DataObject) -> None:
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))), dtype=bool)
    poisoned = np.where(mask[:, None], x, np.nan)
    m = Moments.of(torch.from_numpy(poisoned), mask=torch.from_numpy(mask))
    assert m.count.dtype == torch.int64
    assert_is(m, x[mask].reshape(-1, x.shape[1]))


@given(batches(), st.data())
def test_weights_are_repetitions(x: np.ndarray, data: st.DataObject) -> None:
    weights = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(x), max_size=len(x))), dtype=float)
    m = Moments.of(torch.from_numpy(x), mask=torch.from_numpy(weights))
    assert m.count.dtype == torch.float64
    assert_is(m, np.repeat(x, weights.astype(int), axis=0))
    assert_is(m, x, weights)


def test_mask_broadcasts_and_a_vector_is_one_weight_a_sample() -> None:
    x = torch.randn(4, 3, 4, dtype=torch.float64)  # L == N: the vector must still be per sample
    w = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    full = w[:, None].expand(4, 4).contiguous()
    for mask in (w, w[:, None], full):
        assert_is(Moments.of(x, mask=mask), x.numpy(), full.numpy())
    last = x.movedim(1, -1)
    assert_is(Moments.of(last, channel_dim=-1, mask=w), x.numpy(), full.numpy())


def test_uneven_batches_are_pooled_not_averaged() -> None:
    # 64 rows near 0 and 2 rows near 10: the mean of the two means would be about 5.
    a, b = torch.randn(64, 1, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64) * 0.1 + 10
    joined = Moments.of(a) + Moments.of(b)
    assert_is(joined, torch.cat([a, b]).numpy())
    assert joined.mean.item() < 1


@pytest.mark.parametrize("correction", [0, 1])
def test_var_and_std(correction: int) -> None:
    x = torch.randn(9, 4, dtype=torch.float64)
    m = Moments.of(x)
    torch.testing.assert_close(m.var(correction=correction), x.var(0, correction=correction))
    torch.testing.assert_close(m.std(correction=correction), x.std(0, correction=correction))


@pytest.mark.parametrize(("rows", "correction"), [(0, 0), (1, 1), (2, 3)])
def test_var_of_too_few(rows: int, correction: int) -> None:
    with pytest.raises(CountError, match=rf"got {rows} observations and correction={correction}"):
        Moments.of(torch.zeros(rows, 2)).var(correction=correction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_statistics_are_float64_whatever_comes(dtype: torch.dtype) -> None:
    m = Moments.of(torch.arange(6).reshape(3, 2).to(dtype))
    assert (m.mean.dtype, m.m2.dtype, m.count.dtype) == (torch.float64, torch.float64, torch.int64)
    assert m.mean.tolist() == [2, 3]
    assert m.m2.tolist() == [8, 8]


def test_of_is_differentiable() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: (Moments.of(v).mean, Moments.of(v).m2), (x,))


def test_bad_masks_and_partners() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ShapeError, match=r"got a mask of shape \(3,\) for an input of shape \(2, 3, 4\)"):
        Moments.of(x, mask=torch.ones(3))
    with pytest.raises(ShapeError, match=r"\(2, 4\)"):
        Moments.of(x, mask=torch.ones(2, 3, 4))
    with pytest.raises(OptionError, match="negative"):
        Moments.of(x, mask=torch.tensor([1.0, -1.0]))
    with pytest.raises(ShapeError, match="2 and of 3 channels"):
        Moments.empty(2) + Moments.empty(3)
    with pytest.raises(TypeError):
        Moments.empty(2) + 1  # type: ignore[operator]  # the point of the test


def test_transforms_take_and_give_moments() -> None:
    x = torch.randn(4, 6, 3, dtype=torch.float64)

    def pooled(batch: Tensor, before: Moments) -> Moments:
        return before + Moments.of(batch)

    before = torch.func.vmap(Moments.of)(x)
    assert isinstance(before, Moments)
    assert before.mean.shape == (4, 3)
    after = torch.func.vmap(pooled)(x, before)
    for i in range(4):
        assert_is(Moments(after.count[i], after.mean[i], after.m2[i]), torch.cat([x[i], x[i]]).numpy())

    def loss(batch: Tensor) -> tuple[Tensor, Moments]:
        moments = Moments.of(batch)
        return moments.m2.sum(), moments

    gradient, moments = torch.func.grad(loss, has_aux=True)(x[0])
    assert_is(moments, x[0].numpy())
    torch.testing.assert_close(gradient, 2 * (x[0] - x[0].mean(0)))


def test_moments_of_what_needs_gradients_have_them() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(Moments.of(x).m2.sum(), x)
    torch.testing.assert_close(gradient, 2 * (x - x.mean(0)).detach())
