"""The native kernels against the oracle: every layout, activation, residual and instruction set."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from batchnorm.kernels import cpu
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
from support.samples import LAYOUTS, NATIVE, Layout, Sample

native = torch.ops.batchnorm


@pytest.mark.parametrize("sample", NATIVE, ids=lambda s: s.name)
def test_operations_are_the_oracles(sample: Sample, level: str) -> None:
    assert cpu.level() == level
    assert_the_oracles(native, sample)


@pytest.mark.parametrize("kind", ["bool", "float16", "float32", "float64"])
@pytest.mark.parametrize("sample", NATIVE[::3] + NATIVE[-2:], ids=lambda s: s.name)
def test_masked_operations_are_the_oracles(sample: Sample, kind: str, level: str) -> None:
    assert_the_oracles_of_what_counts(native, sample, kind)


@pytest.mark.parametrize("kind", ["bool", "float16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_mask_may_lie_in_memory_as_it_likes(layout: Layout, kind: str, level: str) -> None:
    sample = Sample(layout, "relu", False)
    t, mask = sample.tensors(), masks(sample)[kind]
    affine = (t["weight"], t["bias"], None, EPS, layout.channel_dim, "relu")
    dims = tuple(range(mask.dim()))
    every_second = torch.zeros(*mask.shape, 2, dtype=mask.dtype)
    every_second[..., 1] = mask
    for same in (mask.permute(dims[::-1]).contiguous().permute(dims[::-1]), every_second[..., 1]):
        assert_the_same_bits(masked_step(native, t, affine, same), masked_step(native, t, affine, mask))
    one = mask[-1:]  # of every sample the same positions
    assert_the_same_bits(
        masked_step(native, t, affine, one.expand_as(mask)),
        masked_step(native, t, affine, one.expand_as(mask).contiguous()),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [1.0, 1.0009765625, 0.3333, 1e-5, 3e38])
def test_every_half_is_read_and_rounded_as_torch_does(dtype: torch.dtype, weight: float, level: str) -> None:
    # In one channel and, in runs of odd lengths, at the ends of runs. With subnormal products, ties, and overflow.
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    mean, var, scale = torch.zeros(1).double(), torch.ones(1).double(), torch.tensor([weight])
    expected = (halves.float() * scale).to(dtype)
    for x in (halves.reshape(1, 1, -1), halves[:65535].reshape(-1, 1, 5)):
        y = native.normalize(x, mean, var, scale, None, None, 0.0, 1, None).reshape(-1)
        same = expected[: len(y)]
        torch.testing.assert_close(y, same, rtol=0, atol=0, equal_nan=True)
        assert not (y.isnan() ^ same.isnan()).any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_what_a_mask_leaves_out_may_be_anything(layout: Layout, activation: str | None, level: str) -> None:
    sample = Sample(layout, activation, False)
    t, mask = sample.tensors(), masks(sample)["bool"]
    out = ~mask.unsqueeze(layout.channel_dim % len(layout.shape)).expand(layout.shape)
    dy = t["dy"].masked_fill(out, 0)
    affine = (t["weight"], t["bias"], None, EPS, layout.channel_dim, activation)
    results = []
    for padding in (0.0, float("nan"), float("inf")):
        x = t["x"].clone().masked_fill_(out, padding)
        y, *moments = native.forward(x, *affine, mask)
        dx, *sums, _ = native.backward(dy, x, *moments, *affine, mask)
        results.append([y.masked_fill(out, 0), *moments, dx, *sums])
    for other in results[1:]:
        assert_the_same_bits(other, results[0])


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize(
    "layout",
    [
        Layout("contiguous", (8, 16, 24, 24)),
        Layout("channels_last", (8, 16, 24, 24), 1, "channels_last"),
        Layout("(N, C)", (4096, 16)),
        Layout("channels_last, many values", (64, 3, 64, 64), 1, "channels_last"),
    ],
    ids=lambda layout: layout.name,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_precision_far_from_zero(layout: Layout, ratio: float, sign: int, level: str) -> None:
    x = layout.arrange(torch.randn(layout.shape, dtype=torch.float64).add_(sign * ratio).float())
    weight, bias = np.linspace(0.5, 2, layout.channels), np.linspace(-1, 1, layout.channels)
    expected, mean, m2 = oracle.forward(x.double().numpy(), weight, bias)
    affine = (torch.from_numpy(weight), torch.from_numpy(bias), None, EPS, 1, None)
    y, _, actual_mean, actual_m2 = native.forward(x, *affine)
    std = np.sqrt(m2 / (x.numel() / layout.channels))
    close(actual_mean, mean, absolute=tolerances.STATISTIC * std)
    close(actual_m2, m2, relative=tolerances.STATISTIC)
    close(y, expected, tolerances.OUTPUT)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("value", [0.1, -1e30, 3e-39])
def test_a_constant_channel_is_exactly_beta(layout: Layout, value: float, level: str) -> None:
    x = layout.arrange(torch.full(layout.shape, value))
    bias = torch.linspace(-1, 1, layout.channels)
    y, _, mean, m2 = native.forward(x, None, bias, None, EPS, layout.channel_dim, None)
    assert torch.equal(y.movedim(layout.channel_dim, -1), bias.expand_as(y.movedim(layout.channel_dim, -1)))
    assert torch.equal(mean, torch.full_like(mean, x.flatten()[0].item()))
    assert torch.equal(m2, torch.zeros_like(m2))


def test_an_outlier_first_does_not_cost_precision(level: str) -> None:
    x = torch.randn(100_000, 3)
    x[0] = 1e8  # the pivot of every channel
    _, mean, m2 = oracle.moments(x.double().numpy())
    _, actual_mean, actual_m2 = native.batch_moments(x, 1)
    close(actual_mean, mean, absolute=tolerances.STATISTIC * np.sqrt(m2 / len(x)))
    close(actual_m2, m2, relative=tolerances.STATISTIC)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS[:4], Layout("long runs", (6, 5, 90, 70)), Layout("many rows", (40, 24, 41, 41), 1, "channels_last")],
    ids=lambda layout: layout.name,
)
@pytest.mark.parametrize("ratio", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("outlier", [None, 500.0, 6e4])
def test_statistics_of_half_precision(
    dtype: torch.dtype, layout: Layout, ratio: float, outlier: float | None, level: str
) -> None:
    # Their sums are float32 for a few steps, about a pivot that is the mean of a few values, or the first that counts.
    x = torch.randn(layout.shape) + ratio
    rows = x.movedim(layout.channel_dim, -1).flatten(0, -2)
    n = len(rows)
    if outlier is not None:
        rows[:: n // 4] = outlier
    x = layout.arrange(rows.view_as(x.movedim(layout.channel_dim, -1)).movedim(-1, layout.channel_dim).to(dtype))
    for mask in (None, torch.ones(x.movedim(layout.channel_dim, -1).shape[:-1], dtype=torch.bool)):
        _, mean, m2 = oracle.moments(x.double().movedim(layout.channel_dim, 1).numpy())
        _, actual_mean, actual_m2 = native.batch_moments(x, layout.channel_dim, mask)
        close(actual_mean, mean, absolute=tolerances.STATISTIC * np.sqrt(m2 / n))
        close(actual_m2, m2, relative=tolerances.STATISTIC)


def test_any_nan_of_a_parameter_stays_one_in_half_precision(level: str) -> None:
    every_bit = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(4, 3, 40).to(dtype)
        for weight, bias in ((every_bit, None), (None, every_bit)):
            assert native.normalize(x, mean, var, weight, bias, None, EPS, 1, "relu").isnan().all()


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, Layout("many parts", (3, 4, 200, 300)), Layout("many rows", (64, 24, 56, 56), 1, "channels_last")],
    ids=lambda layout: layout.name,
)
def test_the_same_bits_with_any_number_of_threads(layout: Layout, level: str, threads: None) -> None:
    sample = Sample(layout, "relu", True)
    t = sample.tensors()
    affine = (t["weight"], t["bias"], t["residual"], EPS, layout.channel_dim, "relu")
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        y, count, mean, m2 = native.forward(t["x"], *affine)
        gradients = native.backward(t["dy"], t["x"], count, mean, m2, *affine)
        masked = [v for mask in masks(sample).values() for v in masked_step(native, t, affine, mask)]
        sums = native.backward_sums(t["dy"], t["x"], mean, m2, *affine)
        results.append([y, mean, m2, *sums, *gradients, *masked])
    for other in results[1:]:
        assert_the_same_bits(other, results[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[6], LAYOUTS[7]], ids=lambda layout: layout.name)
def test_what_is_not_finite_shows_and_stays_in_its_channel(layout: Layout, bad: float, level: str) -> None:
    x = layout.arrange(torch.randn(layout.shape))
    clean, *_ = native.forward(x, None, None, None, EPS, 1, "relu")
    x[-1, 2] = bad
    y, _, mean, m2 = native.forward(x, None, None, None, EPS, 1, "relu")
    assert not mean[2].isfinite()
    assert m2[2].isnan()
    assert y[:, 2].isnan().all()
    others = [c for c in range(layout.channels) if c != 2]
    assert torch.equal(y[:, others], clean[:, others])
    assert mean[others].isfinite().all()


def test_wrong_calls_are_refused_not_read() -> None:
    x, v = torch.randn(4, 3), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"got x int32 .* must be floating"):
        native.batch_moments(x.int(), 1)
    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        native.batch_moments(torch.randn(4), 0)
    with pytest.raises(RuntimeError, match="channel_dim"):
        native.batch_moments(x, 2)
    with pytest.raises(RuntimeError, match=r"got mean .* must have one value for each channel"):
        native.normalize(x, torch.ones(2), v, None, None, None, EPS, 1, None)
    with pytest.raises(RuntimeError, match=r"got weight int32 of shape"):
        native.normalize(x, v, v, v.int(), None, None, EPS, 1, None)
    with pytest.raises(RuntimeError, match=r"got residual .* must have x's shape"):
        native.normalize(x, v, v, None, None, x[:2], EPS, 1, None)
    with pytest.raises(RuntimeError, match=r"got residual float64 .* must have x's shape and dtype"):
        native.normalize(x, v, v, None, None, x.double(), EPS, 1, None)
    with pytest.raises(RuntimeError, match=r"got dy .* must have x's shape"):
        native.backward_sums(x[:2], x, v, v, None, None, None, EPS, 1, None)
    with pytest.raises(RuntimeError, match=r"got activation 'softplus'; there is no native kernel"):
        native.forward(x, None, None, None, EPS, 1, "softplus")


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    zeros = torch.zeros(shape[1], dtype=torch.float64)
    y, count, mean, m2 = native.forward(x, None, None, None, EPS, 1, "relu")
    assert y.shape == shape
    assert count == torch.zeros(shape).movedim(1, 0).shape[1:].numel()  # of each channel, where there is any
    for actual in (mean, m2, *native.batch_moments(x, 1)[1:]):
        assert torch.equal(actual, zeros)
    dx, *sums, _ = native.backward(x, x, count, mean, m2, None, None, None, EPS, 1, "relu")
    assert dx.shape == shape
    assert native.normalize(x, mean, m2, None, None, None, EPS, 1, None).shape == shape
    assert native.backward_input(x, x, mean, m2, None, None, None, EPS, 1, None, None, None)[0].shape == shape
    for actual in (*sums, *native.backward_sums(x, x, mean, m2, None, None, None, EPS, 1, "relu")):
        assert torch.equal(actual, zeros)


# Above 32 MiB, with lines that two runs share and without; then two sweeps where memory is fresh, and blocks of
# channels and streaming stores where it was used before.
LARGE = """
import sys, torch
import batchnorm
from batchnorm.kernels import cpu
from batchnorm.bench.measure import keep_freed_memory
cpu.use_level(sys.argv[1])
native = torch.ops.batchnorm

def work(x, dy, residual):
    weight = torch.linspace(0.5, 2, x.shape[1])
    affine = (weight, weight - 1, residual, 1e-5, 1, "relu")
    y, *moments = native.forward(x, *affine)
    return [y, *moments, *native.backward(dy, x, *moments, *affine)]

cases = []
for shape, last in (((16, 32, 128, 160), False), ((16, 40, 121, 119), False), ((16, 64, 96, 96), True)):
    layout = torch.channels_last if last else torch.contiguous_format
    x, dy, residual = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(3))
    cases += [(x, dy, None), (x, dy, residual)]
fresh = [work(*case) for case in cases]
x = cases[0][0].double()
weight = torch.linspace(0.5, 2, x.shape[1]).double()
expected = torch.nn.functional.batch_norm(x, None, None, weight, weight - 1, True).relu()
assert (fresh[0][0] - expected).abs().max() < 1e-5
keep_freed_memory()
kept = [torch.empty(2**28).fill_(float("nan"))]  # pages that stay when it goes
del kept
for case, expected in zip(cases, fresh):
    for threads in (2, 1):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(work(*case), expected))
"""


@pytest.mark.long
def test_large_inputs_have_the_same_bits_in_fresh_and_in_used_memory(level: str) -> None:
    command = [sys.executable, "-c", LARGE, level]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
