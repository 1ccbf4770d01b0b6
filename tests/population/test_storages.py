"""Storages that a pass holds are seen while they live."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from batchnorm import recalibrate
from batchnorm.population.storages import Storages, storages, watch_storages
from support.comparison import close


def test_storages_of_plain_tensors() -> None:
    x = torch.randn(4)
    sparse, meta = torch.eye(2).to_sparse(), torch.zeros(2, device="meta")
    assert list(storages([x, {"a": (x[1:], sparse, meta)}, nn.Parameter(x), 3])) == [x.untyped_storage()] * 3


def test_watching() -> None:
    """What goes in and comes out, keywords included, as long as a view of it lives."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(2, 3), nn.ReLU(inplace=True)

        def forward(self, *, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.linear(x)
            view = hidden[1:]
            return view, self.relu(hidden + 1)

    net, seen = Net(), weakref.WeakSet()
    with watch_storages(net, seen.update), torch.no_grad():
        x = torch.randn(3, 2)
        view, out = net(x=x)
    expected: Storages = weakref.WeakSet(t.untyped_storage() for t in (x, view, out))
    assert set(seen) == set(expected)
    assert len(seen) == 3
    del view, expected
    assert len(seen) == 2
    net(x=torch.randn(3, 2))  # nobody watches any more
    assert len(seen) == 2
    assert not net.linear._forward_hooks
    assert not net._forward_pre_hooks


def test_what_takes_no_hooks_is_seen_where_it_comes_out() -> None:
    net = nn.Sequential(nn.Linear(2, 3), torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), nn.BatchNorm1d(3))
    seen: Storages = weakref.WeakSet()
    x = torch.randn(5, 2)
    with watch_storages(net, seen.update), torch.no_grad():
        y = net(x)
    assert y.untyped_storage() in set(seen)
    recalibrate(net, [x])
    close(net[2].running_mean, net[1](net[0](x)).detach().mean(0))
