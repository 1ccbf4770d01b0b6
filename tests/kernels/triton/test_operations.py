"""The operations of Triton's kernels against the oracle: every layout and dtype, by one, two and three launches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm.kernels import reference
from batchnorm.kernels.triton import operations
from support import oracle, tolerances
from support.comparison import close
from support.operations import (
    EPS,
    assert_the_oracles,
    assert_the_oracles_of_what_counts,
    assert_the_same_bits,
    masked_step,
    masks,
)
from support.samples import Layout, Sample

LAYOUTS = [
    Layout("(N, C)", (37, 5)),
    Layout("(N, L, C)", (4, 9, 5), -1),
    Layout("(N, C, L)", (4, 3, 37)),
    Layout("(N, C, H, W)", (3, 3, 5, 9)),
    Layout("(N, C, H, W) channels_last", (3, 5, 5, 4), 1, "channels_last"),
    Layout("channels_last, channels elsewhere", (3, 4, 5, 3), -1, "channels_last"),
    Layout("(N, C, H, W) permuted", (3, 3, 5, 6), 1, "permuted"),
    Layout("(N, C, H, W) with gaps", (3, 3, 5, 6), 1, "gaps"),
    Layout("(N, C, H, W) expanded", (3, 3, 5, 6), 1, "expanded"),
    Layout("(N, C, 1, 1)", (33, 5, 1, 1)),
    Layout("(1, 1, H, W)", (1, 1, 9, 40)),
    Layout("(N, C, D, H, W)", (2, 3, 2, 5, 6)),
    Layout("(N, C, D, H, W) channels_last_3d", (2, 3, 2, 5, 6), 1, "channels_last"),
    Layout("(C, N)", (3, 70), 0),
]
EACH_PATH = [LAYOUTS[0], LAYOUTS[3], LAYOUTS[4]]
# Every way to go through tiles: other layouts are, once they are arranged, one of these.
EACH_WALK = [*EACH_PATH, LAYOUTS[5], LAYOUTS[10], LAYOUTS[13]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_in_one_launch(layout: Layout) -> None:
    assert_the_oracles(operations, Sample(layout, "relu", True))


@pytest.mark.parametrize("layout", EACH_WALK, ids=lambda layout: layout.name)
def test_in_parts(layout: Layout, small: None) -> None:
    assert_the_oracles(operations, Sample(layout, "relu", True))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
def test_half_precision_in_parts(layout: Layout, dtype: torch.dtype, small: None) -> None:
    assert_the_oracles(operations, Sample(layout, "silu", True, dtype))


@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
def test_without_weight_bias_and_activation(layout: Layout, small: None) -> None:
    assert_the_oracles(operations, Sample(layout, None, True, affine=False))


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *((layout, kind) for layout in (*EACH_PATH, LAYOUTS[5]) for kind in ("bool", "float32")),
        *((LAYOUTS[4], kind) for kind in ("float16", "float64")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_masks_in_one_launch(layout: Layout, kind: str) -> None:
    assert_the_oracles_of_what_counts(operations, Sample(layout, "silu", True), kind)


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("layout", [*EACH_PATH, LAYOUTS[5]], ids=lambda layout: layout.name)
def test_masks_in_parts(layout: Layout, kind: str, small: None) -> None:
    assert_the_oracles_of_what_counts(operations, Sample(layout, "silu", True), kind)


def test_a_mask_in_another_order() -> None:
    sample = Sample(LAYOUTS[3], "relu", False)
    t, mask = sample.tensors(), masks(sample)["bool"]
    affine = (t["weight"], t["bias"], None, EPS, 1, "relu")
    turned = mask.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert_the_same_bits(masked_step(operations, t, affine, turned), masked_step(operations, t, affine, mask))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
def test_what_a_mask_leaves_out_may_be_anything(layout: Layout, parts: bool, request: pytest.FixtureRequest) -> None:
    if parts:
        request.getfixturevalue("small")
    sample = Sample(layout, "silu", False)
    t, mask = sample.tensors(), masks(sample)["bool"]
    mask.flatten()[: mask.numel() // 2] = False  # the first programs see nothing that counts
    out = ~mask.unsqueeze(1).expand(layout.shape)
    dy = t["dy"].masked_fill(out, 0)
    affine = (t["weight"], t["bias"], None, EPS, 1, "silu")
    results = []
    for padding in (0.0, float("nan"), float("inf")):
        x = t["x"].clone().masked_fill_(out, padding)
        y, *moments = operations.forward(x, *affine, mask)
        dx, *sums, _ = operations.backward(dy, x, *moments, *affine, mask)
        results.append([y.masked_fill(out, 0), *moments, dx, *sums])
    assert results[0][1] == mask.sum()
    for other in results[1:]:
        assert_the_same_bits(other, results[0])


def test_a_mask_that_leaves_nothing(small: None) -> None:
    x = torch.randn(9, 3)
    _, count, mean, m2 = operations.forward(x, None, None, None, EPS, 1, None, torch.zeros(9, dtype=torch.bool))
    assert [count.item(), mean.tolist(), m2.tolist()] == [0, [0.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 1e4])
@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
def test_precision_far_from_zero(layout: Layout, ratio: float, masked: bool, small: None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = layout.arrange((torch.randn(layout.shape, generator=generator, dtype=torch.float64) - ratio).float())
    mask = masks(Sample(layout, None, False))["float32"] if masked else None
    if mask is not None:
        mask.flatten()[: mask.numel() // 4] = 0
    weights = None if mask is None else mask.double().numpy()
    c = layout.channels
    expected, mean, m2 = oracle.forward(x.double().numpy(), np.ones(c), np.zeros(c), weights=weights)
    n, _, _ = oracle.moments(x.double().numpy(), 1, weights)
    y, _, actual_mean, actual_m2 = operations.forward(x, None, None, None, EPS, 1, None, mask)
    close(actual_mean, mean, absolute=tolerances.STATISTIC * np.sqrt(m2 / n))
    close(actual_m2, m2, relative=tolerances.STATISTIC)
    close(y, expected, tolerances.OUTPUT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [0.1, -1e30, 3e-39])
@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
def test_a_constant_channel_is_exactly_beta(layout: Layout, value: float, masked: bool, small: None) -> None:
    x = layout.arrange(torch.full(layout.shape, value))
    bias = torch.linspace(-1, 1, layout.channels)
    mask = masks(Sample(layout, None, False))["float32"] if masked else None
    y, _, mean, m2 = operations.forward(x, None, bias, None, EPS, 1, None, mask)
    assert torch.equal(y.movedim(1, -1), bias.expand_as(y.movedim(1, -1)))
    assert torch.equal(mean, torch.full_like(mean, x.flatten()[0].item()))
    assert torch.equal(m2, torch.zeros_like(m2))


@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
def test_an_outlier_first_does_not_cost_precision(layout: Layout, small: None) -> None:
    x = layout.arrange(torch.randn(layout.shape))
    x[0] = 1e8
    n, mean, m2 = oracle.moments(x.double().numpy())
    _, actual_mean, actual_m2 = operations.batch_moments(x, 1)
    close(actual_mean, mean, absolute=tolerances.STATISTIC * np.sqrt(m2 / n))
    close(actual_m2, m2, relative=tolerances.STATISTIC)


# One, two and three launches: the first with tiles of the usual size, the others with small ones.
LAUNCHES = [
    pytest.param(Layout("", (12, 3)), False, id="one"),
    pytest.param(Layout("", (4, 3, 32)), True, id="two"),
    pytest.param(Layout("", (48, 3)), True, id="three"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1e-25, 1e20, 1e30, 3.4e38, "outlier"])
@pytest.mark.parametrize(("layout", "parts"), LAUNCHES)
def test_extremes(layout: Layout, parts: bool, size: float | str, masked: bool, request: pytest.FixtureRequest) -> None:
    if parts:
        request.getfixturevalue("small")
    sample = Sample(layout, None, False)
    t = sample.tensors(offset=1.0)
    if size == "outlier":
        t["x"][-1, 1] = 1e25  # its square is no float32, and k was chosen without it
    elif size == 3.4e38:
        # Most on one side, so that one on the other is further from the mean than float32 reaches.
        t["x"] = torch.where(t["x"] > 3.5, size, -size) * (1 - 0.05 * torch.rand(layout.shape))
    else:
        t["x"] *= size
    o = sample.oracle_inputs(t)
    mask = masks(sample)["float32"] if masked else None
    weights = None if mask is None else mask.double().numpy()
    options = (t["weight"], t["bias"], None, 0.0, 1, None)
    arrays = (o["weight"], o["bias"], None, 0.0)
    n, mean, m2 = oracle.moments(o["x"], 1, weights)
    y, _, _ = oracle.forward(o["x"], *arrays, weights=weights)
    dx, _, dweight, dbias = oracle.backward(o["dy"], o["x"], mean, m2 / n, *arrays, weights=weights)

    actual_y, *moments = operations.forward(t["x"], *options, mask)
    actual_dx, actual_dweight, actual_dbias, _ = operations.backward(t["dy"], t["x"], *moments, *options, mask)
    close(moments[1], mean, absolute=tolerances.STATISTIC * np.sqrt(m2 / n), name="mean")
    close(moments[2], m2, relative=tolerances.STATISTIC, name="m2")
    close(actual_y, y, tolerances.OUTPUT, name="y")
    close(actual_dx, dx, absolute=tolerances.GRADIENT * np.abs(dx).max((0, *range(2, dx.ndim)), keepdims=True))
    root = (dx.size / layout.channels) ** 0.5
    close(actual_dweight, dweight, absolute=tolerances.SUM_PER_ROOT * root * np.abs(y).max(), name="dweight")
    close(actual_dbias, dbias, absolute=tolerances.SUM_PER_ROOT * root, name="dbias")


def test_extremes_of_a_channel_leave_the_others_alone(small: None) -> None:
    x = torch.randn(48, 3)
    clean = operations.batch_moments(x, 1)
    x[:, 1] *= 1e-30
    x[-1, 2] = 1e30
    _, mean, m2 = operations.batch_moments(x, 1)
    assert (mean[0], m2[0]) == (clean[1][0], clean[2][0])
    close(m2[1:], oracle.moments(x.double().numpy())[2][1:], relative=tolerances.STATISTIC)


def test_squares_that_all_become_zero_are_seen(small: None) -> None:
    x = torch.zeros(256, 4)
    x[::2, 1], x[1::2, 1] = 1e-30, -1e-30  # of either sign the same
    x[255, 2] = 1e-30
    x[:, 3] = 1e30
    _, mean, m2 = operations.batch_moments(x, 1)
    expected = oracle.moments(x.double().numpy())
    close(mean, expected[1], absolute=tolerances.STATISTIC * np.sqrt(expected[2] / 256))
    close(m2, expected[2], relative=tolerances.STATISTIC)


def test_eps_is_not_rounded_to_float32() -> None:
    x, zero = torch.arange(8.0).view(-1, 1), torch.zeros(1)
    _, sum_dz_xhat = operations.backward_sums(torch.ones_like(x), x, zero, zero, None, None, None, 0.1, 1, None)
    close(sum_dz_xhat, [28 / 0.1**0.5], relative=tolerances.ONE_ROUNDING[torch.float64][0])


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
def test_what_is_not_finite_shows_as_in_the_reference(
    layout: Layout, bad: float, parts: bool, request: pytest.FixtureRequest
) -> None:
    if parts:
        request.getfixturevalue("small")
    x = layout.arrange(torch.randn(layout.shape))
    clean, *_ = operations.forward(x, None, None, None, EPS, 1, "relu")
    x[-1, 2] = bad
    _, _, expected_mean, _ = reference.forward(x, None, None, None, EPS, 1, "relu")
    running = torch.zeros(layout.channels), torch.ones(layout.channels)
    skipped = torch.zeros(layout.channels, dtype=torch.int64)
    y, _, mean, m2 = operations.forward_commit(
        *(x, None, None, None, EPS, 1, "relu", None), *running, None, skipped, 0.1
    )
    torch.testing.assert_close(mean[2], expected_mean[2], equal_nan=True)
    assert m2[2].isnan()
    assert y[:, 2].isnan().all()
    others = [c for c in range(layout.channels) if c != 2]
    assert torch.equal(y[:, others], clean[:, others])
    assert skipped.tolist() == [int(c == 2) for c in range(layout.channels)]
    assert all(t.isfinite().all() for t in running)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_forward_commit_is_the_references(
    layout: Layout, momentum: float | None, parts: bool, request: pytest.FixtureRequest
) -> None:
    if parts:
        request.getfixturevalue("small")
    sample, c = Sample(layout, "relu", True), layout.channels
    t = sample.tensors()
    arguments = (t["x"], t["weight"], t["bias"], t["residual"], EPS, 1, "relu", None)
    statistics = []
    for implementation in (operations, reference):
        strided = torch.zeros(c, 2)[:, 0]  # changed in place where it lies
        running = [strided, torch.ones(c), torch.tensor(2, dtype=torch.int32), torch.zeros(c, dtype=torch.int64)]
        results = implementation.forward_commit(*arguments, *running, momentum)
        statistics.append([*results, *running])
    for actual, expected in zip(*statistics, strict=True):
        assert actual.stride() == expected.stride()
        close(actual, expected, tolerances.OUTPUT * 40)  # m2 is a sum of a hundred values


@pytest.mark.parametrize("layout", [*EACH_PATH, LAYOUTS[7]], ids=lambda layout: layout.name)
def test_normalize_in_place(layout: Layout) -> None:
    sample = Sample(layout, "relu", False)
    t = sample.tensors()
    statistics = torch.randn(layout.channels), torch.rand(layout.channels)
    arguments = (*statistics, t["weight"], t["bias"])
    for residual in (None, t["x"]):
        x = layout.arrange(t["x"].clone())
        given = x if residual is not None else None
        expected = operations.normalize(x, *arguments, given, EPS, 1, "relu")
        operations.normalize_(x, *arguments, given, EPS, 1, "relu")
        assert torch.equal(x, expected)


def test_one_value_for_each_channel() -> None:
    x = torch.randn(1, 5)
    y, count, mean, m2 = operations.forward(x, None, None, None, EPS, 1, None)
    assert count == 1
    assert torch.equal(mean, x[0].double())
    assert torch.equal(m2, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(y, torch.zeros(1, 5))


@pytest.mark.parametrize("layout", EACH_PATH, ids=lambda layout: layout.name)
def test_the_same_bits_each_time(layout: Layout, small: None) -> None:
    t = Sample(layout, "relu", True).tensors()
    affine = (t["weight"], t["bias"], t["residual"], EPS, 1, "relu")
    assert_the_same_bits(masked_step(operations, t, affine, None), masked_step(operations, t, affine, None))
