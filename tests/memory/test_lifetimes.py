"""`recompute`: how long outputs live, and how often they are computed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.memory.values import Saved, Value
from support.networks import Calls
from support.passes import chain, conv, counted, images, norm, residual


def outputs_of(model: nn.Module, kind: type[nn.Module] = bn.BatchNorm2d) -> list[weakref.ref[Tensor]]:
    """References to what layers give, filled when the model is called."""
    seen: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, args, y: seen.append(weakref.ref(y)))
    return seen


@pytest.mark.parametrize("on", [False, True])
def test_outputs_are_gone_after_the_forward_pass(on: bool) -> None:
    net = chain()
    if on:
        bn.recompute(net)
    seen = outputs_of(net)
    y = net(images())
    assert [ref() is None for ref in seen] == [on] * 3
    del y


def test_each_output_is_computed_once() -> None:
    net = chain()
    bn.recompute(net)
    y = net(images()).sum()
    with counted() as calls:
        y.backward()
    assert len(calls) == 3


def two_readers() -> nn.Module:
    torch.manual_seed(0)
    return Calls(
        lambda net, x: [layer(y) for y in [net.n(net.a(x))] for layer in (net.b, net.c)],
        a=conv(3),
        n=norm(),
        b=conv(),
        c=conv(),
    )


def test_an_output_with_several_readers_is_computed_once_and_freed_after_the_last() -> None:
    net = two_readers()
    bn.recompute(net)
    b, c = net(images())
    with counted() as calls:
        (b.sum() + c.sum()).backward()
    assert len(calls) == 1


def living_values() -> int:
    """Values that somebody has computed and that wait for a reader."""
    gc.collect()
    return sum(isinstance(o, Value) and o._computed is not None for o in gc.get_objects())


def test_what_is_computed_waits_for_its_readers_alone() -> None:
    net = two_readers()
    bn.recompute(net)
    b, c = net(images())
    assert living_values() == 0
    torch.autograd.grad(b.sum(), net.b.weight, retain_graph=True)
    assert living_values() == 1  # for c
    with counted() as calls:
        torch.autograd.grad(c.sum(), net.c.weight, retain_graph=True)
    assert calls == []
    assert living_values() == 0
    with counted() as calls:  # all have read: the next backward pass begins anew
        torch.autograd.grad(b.sum() + c.sum(), [net.b.weight, net.c.weight], retain_graph=True)
    assert len(calls) == 1
    assert living_values() == 0


def test_a_reader_that_dies_is_not_waited_for() -> None:
    net = two_readers()
    bn.recompute(net)
    b, c = net(images())
    del c
    torch.autograd.grad(b.sum(), net.b.weight, retain_graph=True)
    assert living_values() == 0


def test_nothing_outlives_the_backward_pass() -> None:
    net = residual()
    bn.recompute(net)
    y = net(images()).sum()
    y.backward()
    gc.collect()
    assert not any(isinstance(o, (Value, Saved)) for o in gc.get_objects())
    del y


def test_chains_of_residuals_have_anchors_and_compute_each_output_once() -> None:
    net = residual(9)
    handle = bn.recompute(net)
    y = net(images()).sum()
    ends = [f"{i}.bn2" for i in range(2, 11)]
    kept = [layer for layer in ends if layer in handle.report.left]
    # The stem's output is the first residual: of the chain, each fifth is kept.
    assert kept == ["5.bn2", "10.bn2"]
    assert all("chain" in handle.report.left[layer] for layer in kept)
    with counted() as calls:
        y.backward()
    assert len(calls) == len(handle.report.recomputed)
