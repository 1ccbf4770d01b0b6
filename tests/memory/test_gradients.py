"""`recompute`: the same gradients, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support.networks import Calls
from support.passes import CHANNELS, chain, check, conv, gradients, images, norm, residual, same_bits


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "hardswish", "mish", "tanh", None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_chain(activation: str | None, memory_format: torch.memory_format) -> None:
    net = chain(activation).to(memory_format=memory_format)
    report = check(net, images().to(memory_format=memory_format)).report
    assert report.recomputed == ("1", "3", "5")
    assert report.left == {}
    assert report.saved == 3 * 4 * CHANNELS * 32 * 32 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert check(chain().to(dtype), images().to(dtype)).report.recomputed == ("1", "3", "5")


def test_autocast() -> None:
    def call(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = net(x)
        return y

    report = check(chain(), images(size=64), call).report
    assert report.recomputed == ("1", "3", "5")
    assert report.saved == 3 * 4 * CHANNELS * 64 * 64 * 2


@pytest.mark.parametrize("own_affine", [False, True])
def test_samples_of_several_domains(own_affine: bool) -> None:
    def call(net: nn.Module, x: Tensor) -> Tensor:
        with bn.domain(net, torch.arange(len(x)) % 2):
            y: Tensor = net(x)
        return y

    report = check(chain(domains=("clean", "noisy"), own_affine=own_affine), images(), call).report
    assert report.recomputed == ("1", "3", "5")


@pytest.mark.parametrize("fused", [False, True])
def test_residuals(fused: bool) -> None:
    check(residual(fused=fused), images())


@pytest.mark.parametrize(
    "options",
    [{"virtual_batch_size": 2}, {"renorm": bn.Renorm(2.0, 1.0)}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_options_of_layers(options: dict[str, Any]) -> None:
    check(chain(**options), images())


def test_layers_without_parameters_are_known_by_their_statistics_or_counted_together() -> None:
    assert check(chain(affine=False), images()).report.recomputed == ("1", "3", "5")
    report = check(chain(affine=False, track_running_stats=False), images()).report
    assert report.saved == 3 * 4 * CHANNELS * 32 * 32 * 4
    assert report.recomputed == ()


def test_a_mask() -> None:
    mask = torch.rand(4, 32, 32) > 0.5
    net = Calls(lambda net, x: net.b(net.n(net.a(x), mask=mask)), a=conv(3), n=norm(), b=conv())
    assert check(net, images()).report.recomputed == ("n",)


@pytest.mark.parametrize("mode", ["inference", "frozen"])
def test_running_statistics(mode: str) -> None:
    net = chain()
    net = net.eval() if mode == "inference" else bn.freeze(net)
    assert check(net, images()).report.recomputed == ("1", "3", "5")


def test_deferred_statistics_and_accumulated_gradients() -> None:
    def accumulated(net: nn.Module) -> dict[str, Tensor]:
        with bn.deferred(net):
            outputs = [net(images(seed=seed)) for seed in (1, 2, 3)]  # all before the first backward pass
            for y in outputs:
                y.square().mean().backward()
        found = {name: p.grad for name, p in net.named_parameters()}
        return found | dict(net.named_buffers())

    net = chain()
    expected = accumulated(copy.deepcopy(net))
    with bn.recompute(net) as handle:
        same_bits(accumulated(net), expected)
    assert handle.report.recomputed == ("1", "3", "5")


def test_several_backward_passes() -> None:
    def passes(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        y = net(x)
        y.square().mean().backward(retain_graph=True)
        first = {name: p.grad.clone() for name, p in net.named_parameters()}
        (part,) = torch.autograd.grad(y.sum(), net[0].weight, retain_graph=True)
        y.sin().mean().backward()
        return first | {f"{name} both": p.grad for name, p in net.named_parameters()} | {"part": part}

    net = residual()
    expected = passes(copy.deepcopy(net), images())
    bn.recompute(net)
    same_bits(passes(net, images()), expected)


def test_higher_derivatives() -> None:
    def second(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(net(x).square().mean(), x, create_graph=True)
        dx.square().sum().backward()
        return {"dx": dx.detach(), "ddx": x.grad} | {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    net = chain("silu", 2)
    expected = second(copy.deepcopy(net), images())
    handle = bn.recompute(net)
    same_bits(second(net, images()), expected)
    assert handle.report.recomputed == ("1", "3")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_part(reentrant: bool) -> None:
    def call(net: nn.Module, x: Tensor) -> Tensor:
        return net.c(checkpoint(net.b, net.a(x), use_reentrant=reentrant))

    torch.manual_seed(0)
    net = Calls(
        call,
        a=nn.Sequential(conv(3), norm()),
        b=nn.Sequential(conv(), norm(), conv(), norm()),
        c=nn.Sequential(conv(), norm(), conv()),
    )
    report = check(net, images()).report
    assert "c.1" in report.recomputed
    assert "b.1" in report.left


def test_checkpointing_around_all_of_it() -> None:
    net = chain()
    other = copy.deepcopy(net)
    expected = gradients(other, images(), lambda x: checkpoint(other, x, use_reentrant=False))
    bn.recompute(net)
    same_bits(gradients(net, images(), lambda x: checkpoint(net, x, use_reentrant=False)), expected)
