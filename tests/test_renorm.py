"""Batch renormalization against its paper's formula in float64, and against Keras' and torch's where they have it."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import errors
from batchnorm.renorm import Renorm, corrections
from support import oracle, tolerances
from support.comparison import close

C, EPS = 8, 1e-5
SHAPES = {"(N, C)": ((12, C), 1), "(N, C, L)": ((4, C, 5), 1), "(N, L, C)": ((4, 5, C), -1), "(C, N)": ((C, 12), 0)}
LIMITS = [(1.0, 0.0), (1.5, 0.5), (3.0, 5.0), (math.inf, math.inf)]


def running() -> tuple[Tensor, Tensor]:
    """Running statistics that a standard normal batch is near to in some channels, and far from in others."""
    mean = torch.tensor([0.0, 0.1, -0.2, 0.3, 1.0, -8.0, 9.0, 0.0])
    var = torch.tensor([1.0, 0.8, 1.3, 9.0, 0.05, 1.0, 0.01, 80.0])
    return mean, var


def made(**options: Any) -> bn.BatchNorm:
    layer = bn.BatchNorm(C, **({"renorm": Renorm()} | options))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter, value in ((layer.weight, torch.rand(C) + 0.5), (layer.bias, torch.randn(C))):
            if parameter is not None:
                parameter.copy_(value)
    for statistic, value in zip((layer.running_mean, layer.running_var), running(), strict=True):
        assert statistic is not None
        statistic.copy_(value)
    return layer


def per_channel(v: Any, shape: tuple[int, ...], axis: int) -> Any:
    return v.reshape([-1 if dim == axis % len(shape) else 1 for dim in range(len(shape))])


def paper(
    x: oracle.Array, limits: tuple[float, float], axis: int = 1, weights: oracle.Array | None = None
) -> tuple[oracle.Array, oracle.Array, oracle.Array]:
    """Ioffe 2017, algorithm 1, before gamma and beta: x_hat, r and d."""
    rmax, dmax = limits
    n, mean, m2 = oracle.moments(x, axis, weights)
    sigma_b = np.sqrt(EPS + m2 / n)
    mu, sigma = running()[0].double().numpy(), np.sqrt(EPS + running()[1].double().numpy())
    r = np.clip(sigma_b / sigma, 1 / rmax, rmax)
    d = np.clip((mean - mu) / sigma, -dmax, dmax)
    mean, sigma_b, *both = (per_channel(v, x.shape, axis) for v in (mean, sigma_b, r, d))
    return (x - mean) / sigma_b * both[0] + both[1], r, d


def affine(layer: bn.BatchNorm, x_hat: oracle.Array, axis: int = 1) -> oracle.Array:
    weight = np.ones(C) if layer.weight is None else layer.weight.detach().double().numpy()
    bias = np.zeros(C) if layer.bias is None else layer.bias.detach().double().numpy()
    y: oracle.Array = x_hat * per_channel(weight, x_hat.shape, axis) + per_channel(bias, x_hat.shape, axis)
    return y


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_the_papers_formula(kind: str, limits: tuple[float, float]) -> None:
    shape, axis = SHAPES[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layer = made(renorm=Renorm(*limits), channel_dim=axis)
    x_hat, r, d = paper(x.double().numpy(), limits, axis)
    if limits == (3.0, 5.0):  # some of everything: below, between and above the limits
        assert {1 / 3, 3.0} < set(r)
        assert {-5.0, 5.0} < set(d)
        assert (abs(d) < 5).sum() > 2
    close(layer(x), affine(layer, x_hat, axis))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_with_r_and_d_as_constants(kind: str, limits: tuple[float, float]) -> None:
    shape, axis = SHAPES[kind]
    layer = made(renorm=Renorm(*limits), channel_dim=axis, dtype=torch.float64, activation="silu")
    x, residual = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [x, layer.weight, layer.bias, residual]
    dy = torch.randn(shape, dtype=torch.float64)
    actual = torch.autograd.grad(layer(x, residual=residual), inputs, dy)

    _, r, d = paper(x.detach().numpy(), limits, axis)
    dims = [dim for dim in range(x.dim()) if dim != axis % x.dim()]
    mean, var = x.mean(dims), x.var(dims, correction=0)
    vectors = (mean, (var + EPS).sqrt(), torch.from_numpy(r), torch.from_numpy(d), layer.weight, layer.bias)
    mean, std, r, d, weight, bias = (per_channel(v, shape, axis) for v in vectors)
    y = F.silu(((x - mean) / std * r + d) * weight + bias + residual)
    for a, e in zip(actual, torch.autograd.grad(y, inputs, dy), strict=True):
        close(a, e)


@pytest.mark.parametrize("limits", LIMITS[:3], ids=str)
def test_keras_corrections(limits: tuple[float, float]) -> None:
    """BatchNormalization(renorm=True), as Keras 2 had it, whose renorm_stddev is our sqrt(running_var + eps)."""
    rmax, dmax = limits
    x = torch.randn(12, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    renorm_mean, renorm_stddev = running()[0].numpy(), np.sqrt(running()[1].double().numpy() + EPS)
    mean, stddev = x.numpy().mean(0), np.sqrt(x.numpy().var(0) + EPS)
    r = np.minimum(np.maximum(stddev / renorm_stddev, 1 / rmax), rmax)
    d = np.minimum(np.maximum((mean - renorm_mean) / renorm_stddev, -dmax), dmax)
    actual = corrections(bn.Moments.of(x), *running(), EPS, *limits)
    for a, e in zip(actual, (r, d), strict=True):
        close(a, e)
    layer = made(renorm=Renorm(*limits), dtype=torch.float64)
    scale, offset = (t.detach().numpy() for t in (layer.weight, layer.bias))
    close(layer(x).detach(), (x.numpy() - mean) / stddev * (scale * r) + (offset + scale * d))


def test_corrections_are_constants() -> None:
    """Whatever they are computed from: `Moments.of` is differentiable."""
    r, d = corrections(bn.Moments.of(torch.randn(12, C, requires_grad=True)), *running(), EPS, 3.0, 5.0)
    assert not r.requires_grad
    assert not d.requires_grad


def test_limits_of_1_and_0_are_batch_normalization() -> None:
    ours, theirs = made(renorm=Renorm(1.0, 0.0)), nn.BatchNorm1d(C)
    theirs.load_state_dict(ours.state_dict())
    dy = torch.randn(12, C)
    for step in range(3):
        x = (torch.randn(12, C) * (step + 1) + step).requires_grad_()
        results = [(y := layer(x), *torch.autograd.grad(y, [x, *layer.parameters()], dy)) for layer in (ours, theirs)]
        for a, e in zip(*results, strict=True):
            close(a, e)


def test_without_limits_training_is_inference() -> None:
    layer, x = made(renorm=Renorm(math.inf, math.inf)), torch.randn(12, C)
    expected = F.batch_norm(x.double(), *(t.double() for t in (*running(), layer.weight, layer.bias)))
    close(layer(x), expected.detach().numpy())


def test_inference_is_as_without() -> None:
    layer, x = made(renorm=Renorm(1.0, 0.0)).eval(), torch.randn(12, C)
    close(layer(x), F.batch_norm(x, *running(), layer.weight, layer.bias))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_move_as_in_batch_normalization(momentum: float | None) -> None:
    ours, theirs = bn.BatchNorm1d(C, momentum=momentum, renorm=Renorm()), nn.BatchNorm1d(C, momentum=momentum)
    for step in range(4):
        x = torch.randn(12, C) * (step + 1) + step
        ours(x), theirs(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        close(ours.state_dict()[key], value, tolerances.STATISTIC)


# --- with everything else --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"activation": "gelu"}, {"eps": EPS}], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_with_the_other_options(options: dict[str, Any], with_residual: bool, with_mask: bool) -> None:
    layer, x = made(**options), torch.randn(6, C, 5)
    residual = torch.randn(6, C, 5) if with_residual else None
    mask = torch.arange(30).view(6, 5) % 4 != 1 if with_mask else None
    weights = None if mask is None else mask.double().numpy()
    x_hat, *_ = paper(x.double().numpy(), (3.0, 5.0), weights=weights)
    z = affine(layer, x_hat) + (0 if residual is None else residual.double().numpy())
    close(layer(x, residual=residual, mask=mask), oracle.activate(z, layer.activation))
    moved = oracle.commit(
        tuple(t.double().numpy() for t in running()), *oracle.moments(x.double().numpy(), weights=weights), 0.1
    )
    for statistic, expected in zip((layer.running_mean, layer.running_var), moved, strict=True):
        close(statistic, expected, tolerances.STATISTIC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False])
def test_half_precision(dtype: torch.dtype, whole: bool) -> None:
    layer, x = made(dtype=dtype if whole else None), torch.randn(12, C).to(dtype).requires_grad_()
    if whole:  # the running statistics are float32, and the paper's function has them unrounded
        assert layer.running_var is not None
        assert layer.running_var.dtype == torch.float32
    x_hat, *_ = paper(x.detach().double().numpy(), (3.0, 5.0))
    y = layer(x)
    assert y.dtype == dtype
    close(y.detach(), affine(layer, x_hat))
    gradients = torch.autograd.grad(y.float().sum(), [x, layer.weight, layer.bias])
    assert [g.dtype for g in gradients] == [dtype, layer.weight.dtype, layer.bias.dtype]


def test_a_frozen_layer_normalises_by_its_running_statistics() -> None:
    layer, x = made(renorm=Renorm(1.0, 0.0)), torch.randn(12, C)
    bn.freeze(layer)
    close(layer(x), F.batch_norm(x, *running(), layer.weight, layer.bias))


# --- limits and schedules --------------------------------------------------------------------------------------------


def test_schedules_are_given_the_step() -> None:
    steps: dict[str, list[int]] = {"rmax": [], "dmax": []}

    def rmax(step: int) -> float:
        steps["rmax"].append(step)
        return 1.0 + step

    def dmax(step: int) -> float:
        steps["dmax"].append(step)
        return 0.5 * step

    layer = bn.BatchNorm1d(C, renorm=Renorm(rmax, dmax), momentum=0.0)
    for statistic, value in zip((layer.running_mean, layer.running_var), running(), strict=True):
        statistic.copy_(value)  # and they stay, with momentum 0
    for step in range(3):
        x = torch.randn(12, C)
        close(layer(x), paper(x.double().numpy(), (1.0 + step, 0.5 * step))[0])
        layer.eval()(x)
        layer.train()
    assert steps == {"rmax": [0, 1, 2], "dmax": [0, 1, 2]}


def test_one_schedule_and_one_number() -> None:
    x = torch.randn(12, C)
    close(made(renorm=Renorm(lambda step: 2.0 + step, 0.1), affine=False)(x), paper(x.double().numpy(), (2.0, 0.1))[0])
    close(made(renorm=Renorm(1.5, lambda step: step), affine=False)(x), paper(x.double().numpy(), (1.5, 0.0))[0])


@pytest.mark.parametrize("limits", [(0.99, 5.0), (0, 0), (-1, 5), (3.0, -0.1), (math.nan, 5.0), (3.0, math.nan)])
def test_limits_outside_their_range(limits: tuple[float, float]) -> None:
    message = f"got rmax={limits[0]} and dmax={limits[1]} .* rmax must be >= 1 and dmax >= 0"
    with pytest.raises(errors.OptionError, match=message):
        Renorm(*limits)
    layer = made(renorm=Renorm(lambda _: limits[0], lambda _: limits[1]))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(errors.OptionError, match=rf"BatchNorm\({C}\): " + message):
        layer(torch.randn(12, C))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("options", [{"virtual_batch_size": 4}, {"track_running_stats": False}], ids=str)
def test_what_it_excludes(options: dict[str, Any]) -> None:
    with pytest.raises(errors.OptionError, match=r"got renorm with virtual_batch_size or without running statistics"):
        bn.BatchNorm1d(C, renorm=Renorm(), **options)


@pytest.mark.parametrize("renorm", [True, False, 3.0, (3.0, 5.0)], ids=str)
def test_what_is_not_a_renorm(renorm: Any) -> None:
    with pytest.raises(errors.OptionError, match=rf"got renorm={re.escape(repr(renorm))}; it must be None or"):
        bn.BatchNorm1d(C, renorm=renorm)


def test_it_is_shown_and_copied() -> None:
    layer = made(renorm=Renorm(2.0, 1.0))
    assert "renorm=Renorm(rmax=2.0, dmax=1.0)" in repr(layer)
    other = copy.deepcopy(layer)
    assert other.renorm == layer.renorm == Renorm(2.0, 1.0)
    assert (Renorm().rmax, Renorm().dmax) == (3.0, 5.0)
    x = torch.randn(12, C)
    assert torch.equal(other(x), layer(x))
