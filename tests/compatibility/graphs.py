"""Tools that turn a model into a graph."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

import batchnorm as bn
from compatibility.rows import row


def plain_network() -> nn.Module:
    """A network of torch.nn whose statistics are those of some data."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    for _ in range(3):
        net(torch.randn(8, 3, 10, 10) * 2 + 1)
    return net.eval()


def our_network() -> nn.Module:
    """The same, converted and fused."""
    return bn.fuse(bn.convert(copy.deepcopy(plain_network())))


@row("torch.fx, `symbolic_trace`", "torch", "our layers are leaves, as torch.nn's; fused models too")
def symbolic_trace() -> None:
    x = torch.randn(2, 3, 10, 10)
    traced = fx.symbolic_trace(our_network())
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == ["0", "1", "2", "3", "4"]
    torch.testing.assert_close(traced(x), plain_network()(x))
