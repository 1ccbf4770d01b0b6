"""Graphs that a compiler is given: sums by kernels, and plain torch, which computes what the kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import batchnorm as bn
from batchnorm import layout as layout_law
from batchnorm import ops
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels import compiled, reference
from support import oracle, tolerances
from support.comparison import close
from support.operations import EPS, away_from_the_kinks
from support.samples import DTYPES, LAYOUTS, THREE, Sample

SAMPLES = [Sample(layout, None, residual) for layout in LAYOUTS for residual in (False, True)]
SAMPLES += [Sample(layout, None, True, dtype) for layout in THREE for dtype in DTYPES[1:]]
SAMPLES += [Sample(LAYOUTS[0], None, False, affine=False)]
ACTIVATED = [Sample(THREE[1], name, True, dtype) for name in (None, *ACTIVATIONS) for dtype in DTYPES]


def operation(name: str) -> Callable[..., Any]:
    return compiled.operation(name, lambda name: getattr(torch.ops.batchnorm, name).default)


def named(sample: Sample) -> str:
    return sample.name


@pytest.mark.parametrize("offset", [3.0, 2e4])  # |mean| / std up to 1e4
@pytest.mark.parametrize("sample", SAMPLES, ids=named)
def test_a_training_step(sample: Sample, offset: float) -> None:
    t = sample.tensors(offset)
    o = sample.oracle_inputs(t)
    axis = sample.layout.channel_dim
    arguments = (t["weight"], t["bias"], t["residual"], EPS, axis, None)
    arrays = (o["weight"], o["bias"], o["residual"], EPS, axis, None)
    y, count, mean, m2 = operation("forward")(t["x"], *arguments)
    n = o["x"].size // sample.layout.channels
    expected, wanted_mean, wanted_m2 = oracle.forward(o["x"], *arrays)
    close(y, expected, tolerances.OUTPUT, rounded=True)
    assert count == n
    close(mean, wanted_mean, absolute=tolerances.STATISTIC * (wanted_m2 / n) ** 0.5)
    close(m2, wanted_m2, relative=tolerances.STATISTIC)
    gradients = operation("backward")(t["dy"], t["x"], count, mean, m2, *arguments)
    dx, _, dweight, dbias = oracle.backward(o["dy"], o["x"], wanted_mean, wanted_m2 / n, *arrays)
    close(gradients[0], dx, tolerances.GRADIENT, rounded=True)
    of_sums = tolerances.SUM_PER_ROOT * n**0.5
    for actual, sums, parameter in ((gradients[1], dweight, "weight"), (gradients[2], dbias, "bias")):
        close(actual, sums, of_sums, rounded=True)
        assert actual.dtype == (torch.float64 if t[parameter] is None else t[parameter].dtype)
    assert gradients[3].shape == (0,)
    like = layout_law.laid_out(t["x"], t["x"])
    assert y.stride() == gradients[0].stride() == like.stride()
    assert y.dtype == gradients[0].dtype == t["x"].dtype


@pytest.mark.parametrize("sample", ACTIVATED, ids=named)
def test_by_given_statistics(sample: Sample) -> None:
    t = sample.tensors()
    o = sample.oracle_inputs(t)
    axis, channels = sample.layout.channel_dim, sample.layout.channels
    mean, var = torch.linspace(-1, 4, channels), torch.linspace(0.5, 5, channels)
    statistics = mean.double().numpy(), var.double().numpy()
    arguments = (t["weight"], t["bias"], t["residual"], EPS, axis, sample.activation)
    arrays = (o["weight"], o["bias"], o["residual"], EPS, axis)
    z = oracle.preactivation(o["x"], *statistics, *arrays)
    close(
        operation("normalize")(t["x"], mean, var, *arguments),
        oracle.activate(z, sample.activation),
        tolerances.OUTPUT,
        rounded=True,
    )
    dy = away_from_the_kinks(sample, t["dy"], z)
    wanted = oracle.backward(dy.double().numpy(), o["x"], *statistics, *arrays, sample.activation, constants=True)
    dx, dresidual = operation("backward_input")(dy, t["x"], mean, var, *arguments, None, None)
    close(dx, wanted[0], tolerances.GRADIENT, rounded=True)
    if sample.activation is None:
        assert dresidual.shape == (0,)
    else:
        close(dresidual, wanted[1], tolerances.GRADIENT, rounded=True)


@pytest.mark.parametrize("which", ["activation", "mask", "domain"])
def test_what_stays_with_the_kernels(which: str) -> None:
    t = Sample(LAYOUTS[6], "relu" if which == "activation" else None, True).tensors()
    x, channels = t["x"], LAYOUTS[6].channels
    options = (EPS, 1, "relu" if which == "activation" else None)
    mask = torch.rand(len(x), 7, 9) > 0.3 if which == "mask" else None
    domain = torch.tensor([1, 0, 1]) if which == "domain" else None
    arguments = (t["weight"], t["bias"], t["residual"], *options)
    found = operation("forward")(x, *arguments, mask, domain, 2 if which == "domain" else 1)
    wanted = reference.forward(x, *arguments, mask, domain, 2 if which == "domain" else 1)
    gradients = operation("backward")(t["dy"], x, *found[1:], *arguments, mask, domain)
    for actual, expected in zip(found, wanted, strict=True):
        close(actual, expected)
    for actual, expected in zip(
        gradients, reference.backward(t["dy"], x, *wanted[1:], *arguments, mask, domain), strict=True
    ):
        close(actual, expected, tolerances.LONG_SUMS if actual.dim() == 1 else None)
    if which == "domain":
        statistics = torch.randn(2, channels), torch.rand(2, channels) + 0.5
        close(
            operation("normalize")(x, *statistics, *arguments, domain),
            reference.normalize(x, *statistics, *arguments, domain),
        )


def operators(layer: nn.Module, x: Tensor, *, gradients: bool = True) -> set[str]:
    """Those of ours in the graphs that a compiler is given for a call and its backward pass, but the commit's."""
    seen: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.update(str(node.target).split(".")[1] for node in graph.graph.nodes if "batchnorm" in str(node.target))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    call = torch.compile(layer, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler), fullgraph=True)
    with torch.set_grad_enabled(gradients):
        y = call(x)
    if gradients:
        y.sum().backward()
    return seen - {"commit", "unless_repeated"}


@pytest.mark.skipif("native" not in bn.kernels()[0].implementation, reason="without kernels, all is plain torch")
def test_what_a_compiler_sees() -> None:
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    assert operators(bn.BatchNorm2d(4), x) == {"batch_moments", "backward_sums"}
    assert operators(bn.BatchNorm2d(4, activation="relu"), x) == {"forward", "backward"}
    for activation in (None, "relu"):
        layer = bn.BatchNorm2d(4, activation=activation).eval()
        assert operators(layer, x, gradients=False) == set()
        assert operators(layer, x) == {"backward_sums"}
    assert ops.select(x).eager, "outside of graphs nothing changes"
