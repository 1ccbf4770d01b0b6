"""Torch's operators with our moments: what devices without kernels of ours compute, tried on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import layout as layout_law
from batchnorm import ops
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels import fallback
from support import oracle, tolerances
from support.comparison import close
from support.operations import EPS, away_from_the_kinks, masks
from support.samples import Layout, Sample
from support.torch_traffic import Count, moved_by_torch

LAYOUTS = [
    Layout("(N, C)", (37, 5)),
    Layout("(N, L, C)", (4, 9, 5), -1),
    Layout("(N, C, H, W)", (3, 5, 5, 9)),
    Layout("(N, C, H, W) channels_last", (3, 5, 5, 4), 1, "channels_last"),
    Layout("(N, C, H, W) permuted", (3, 3, 5, 6), 1, "permuted"),
]


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device that nobody has made kernels for."""
    monkeypatch.setattr(ops, "_TABLE", {})
    monkeypatch.setattr(ops, "_WITHOUT_FALLBACK", ())


def layer_for(sample: Sample, t: dict[str, Tensor], **options: Any) -> bn.BatchNorm:
    layer = bn.BatchNorm(
        sample.layout.channels, activation=sample.activation, channel_dim=sample.layout.channel_dim, **options
    )
    with torch.no_grad():
        layer.weight.copy_(t["weight"])
        layer.bias.copy_(t["bias"])
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_training_step(layout: Layout, activation: str | None, dtype: torch.dtype, without_kernels: None) -> None:
    sample = Sample(layout, activation, True, dtype)
    t = sample.tensors()
    o = sample.oracle_inputs(t)
    layer = layer_for(sample, t)
    arrays = (o["weight"], o["bias"], o["residual"], EPS, layout.channel_dim, activation)
    n = o["x"].size / layout.channels
    expected, mean, m2 = oracle.forward(o["x"], *arrays)
    dy = away_from_the_kinks(sample, t["dy"], oracle.preactivation(o["x"], mean, m2 / n, *arrays[:4], arrays[4]))
    dx, dz, dweight, dbias = oracle.backward(dy.double().numpy(), o["x"], mean, m2 / n, *arrays)
    x, residual = t["x"].requires_grad_(), t["residual"].requires_grad_()
    y = layer(x, residual=residual)
    y.backward(dy)
    roundings = tolerances.SEVERAL_ROUNDINGS.get(dtype)
    for actual, wanted in ((y, expected), (x.grad, dx), (residual.grad, dz)):
        close(actual, wanted, roundings)
    for actual, wanted in ((layer.weight.grad, dweight), (layer.bias.grad, dbias)):
        close(actual, wanted, absolute=roundings and roundings * n**0.5)
    close(layer.running_mean, 0.1 * mean)
    close(layer.running_var, 0.9 + 0.1 * m2 / (n - 1))
    assert layer.num_batches_tracked == 1
    moments = bn.Moments.of(x.detach(), channel_dim=layout.channel_dim)
    _, count, actual_mean, actual_m2 = fallback.forward(x, None, None, None, EPS, layout.channel_dim, None)
    assert torch.equal(count, moments.count)
    close(actual_mean, moments.mean, absolute=tolerances.STATISTIC * moments.std().numpy())
    close(actual_m2, moments.m2, relative=tolerances.STATISTIC)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_results_lie_as_torchs(layout: Layout, without_kernels: None) -> None:
    t = Sample(layout, None, False).tensors()
    layer = bn.BatchNorm(layout.channels, channel_dim=layout.channel_dim)
    like = layout_law.laid_out(t["x"], t["x"])
    for training in (True, False):
        assert layer.train(training)(t["x"]).stride() == like.stride()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_inference(activation: str | None, gradients: bool, without_kernels: None) -> None:
    sample = Sample(LAYOUTS[2], activation, True)
    t = sample.tensors()
    layer = layer_for(sample, t).eval()
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    o = sample.oracle_inputs(t)
    statistics = [t.double().numpy() for t in (layer.running_mean, layer.running_var)]
    with torch.set_grad_enabled(gradients):
        y = layer(t["x"], residual=t["residual"])
    z = oracle.preactivation(o["x"], *statistics, o["weight"], o["bias"], o["residual"], EPS, 1)
    close(y, oracle.activate(z, activation))
    over = t["x"].clone()
    arguments: Any = (layer.running_mean, layer.running_var, layer.weight, layer.bias, t["residual"])
    fallback.normalize_(over, *arguments, EPS, 1, activation)
    close(over, y)


def test_statistics_that_are_wider_than_torchs_lose_nothing() -> None:
    x = (torch.randn(64, 3, dtype=torch.float64) + torch.tensor([1e3, -1e4, 0.1])).float()
    count, mean, m2 = ops.DIFFERENTIABLE.batch_moments(x, 1)
    expected, *_ = oracle.forward(x.double().numpy(), np.ones(3), np.zeros(3))
    close(fallback.normalize(x, mean, m2 / count, None, None, None, EPS, 1, None), expected, tolerances.OUTPUT)


def test_options(without_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's operator does not do is the reference's; all of it computes what the CPU's kernels do."""
    variants: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"momentum": None}, {}),
        ({"virtual_batch_size": 2}, {}),
        ({"renorm": bn.Renorm()}, {}),
        ({"track_running_stats": False}, {}),
        ({"affine": False}, {}),
        ({}, {"mask": masks(Sample(LAYOUTS[2], None, False))["float32"]}),
    ]
    for options, arguments in variants:
        layer = bn.BatchNorm2d(5, **options)
        other = copy.deepcopy(layer)
        for seed in range(3):
            x = torch.randn(3, 5, 5, 9, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            with monkeypatch.context() as patch:
                patch.setattr(ops, "_WITHOUT_FALLBACK", ("cpu",))
                expected = other(x, **arguments)
            y = layer(x, **arguments)
            close(y, expected)
            for a, b in zip(*(torch.autograd.grad(v.pow(3).mean(), x) for v in (y, expected)), strict=True):
                close(a, b)
        for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
            close(a, b)


def test_a_channel_that_is_not_finite_is_held_back(without_kernels: None) -> None:
    layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
    x[0, 1] = torch.inf
    layer(x)
    assert layer.num_batches_skipped.tolist() == [0, 1, 0]
    assert layer.running_mean.isfinite().all()


def test_updates_that_are_deferred_or_repeated(without_kernels: None) -> None:
    layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
    whole = copy.deepcopy(layer)
    with bn.deferred(layer):
        layer(x[:4])
        layer(x[4:])
    whole(x)
    close(layer.running_var, whole.running_var)
    torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 2


def test_derivatives_of_any_order(without_kernels: None) -> None:
    layer = bn.BatchNorm1d(3, activation="silu", track_running_stats=False).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_a_compiled_layer(without_kernels: None) -> None:
    layer = bn.BatchNorm2d(5, activation="relu")
    eager, x = copy.deepcopy(layer), torch.randn(3, 5, 4, 4).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        y, expected = compiled(x), eager(x)
        close(y, expected)
        (dx,), (wanted,) = (torch.autograd.grad(v.pow(3).mean(), x) for v in (y, expected))
        close(dx, wanted)
    close(layer.running_var, eager.running_var)
    assert layer.num_batches_tracked == 2


def test_torchs_layers_have_the_same_graph(without_kernels: None) -> None:
    """The same operators of autograd's: what they move and keep is what torch's layer moves and keeps."""
    ours, torchs = bn.BatchNorm2d(5, activation="relu"), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())
    x = torch.randn(3, 5, 4, 4).requires_grad_()
    chains = []
    for model in (ours, torchs):
        function, names = model(x).grad_fn, []
        while function is not None:
            names.append(function.name())
            function = next((f for f, _ in function.next_functions if f is not None), None)
        chains.append(names)
    assert chains[0] == chains[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_moves_what_torchs_moves(memory_format: torch.memory_format, residual: bool, dtype: torch.dtype) -> None:
    shape = (64, 64, 56, 56)
    x = torch.empty(shape, device="meta", dtype=dtype).to(memory_format=memory_format)
    expected = moved_by_torch(x, residual=residual, reads=2)
    layer = bn.BatchNorm2d(64, activation="relu", device="meta")
    leaves = [x.requires_grad_(), *layer.parameters()]
    added, dy = torch.empty_like(x).requires_grad_() if residual else None, torch.empty_like(x)
    with Count(x.shape, 2) as forward:
        y = layer(x, residual=added)
    with Count(x.shape, 2) as backward:
        torch.autograd.grad(y, [*leaves, *([] if added is None else [added])], dy)
    assert [forward.moved, backward.moved] == expected
