"""Traps in statistics that are computed from data after training: each check runs a kit's function on some."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.errors import CountError
from support import oracle
from support.populations import inputs, layers
from traps.kits import RIGHT, Kit, after, apart, draw, expect, show


class BrokenLoaderError(Exception):
    """What a loader raises."""


def uneven_batches(kit: Kit) -> str:
    layer, generator = kit.BatchNorm1d(1), torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 1, generator=generator), torch.randn(2, 1, generator=generator) + 10]
    kit.recompute(nn.Sequential(layer), batches)
    n, mean, m2 = oracle.moments(torch.cat(batches).double().numpy())
    shown = f"64 rows near 0 and 2 near 10: {show(layer.running_mean[0])}, {show(layer.running_var[0])}"
    right = max(abs(layer.running_mean.item() - mean.item()), abs(layer.running_var.item() - m2.item() / n)) < RIGHT
    return expect(right, f"{shown} where mean {show(mean.item())}, variance {show(m2.item() / n)} are right")


def upstream(kit: Kit) -> str:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), kit.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), kit.BatchNorm1d(8))
    batches = list(draw(32, 3).split(8))
    kit.recompute(net, batches)
    errors = []
    for name, rows in inputs(net, batches).items():
        layer = layers(net)[name]
        n, mean, m2 = oracle.moments(rows)
        off = (layer.running_mean.double() - torch.from_numpy(mean)) / torch.from_numpy(m2 / n + layer.eps).sqrt()
        errors.append(float(off.abs().max()))
    return expect(max(errors) < RIGHT, f"means of two layers off by {show(torch.tensor(errors))} standard deviations")


def no_data(kit: Kit) -> str:
    layer = kit.BatchNorm1d(3)
    layer(draw(16, 3))
    said = "nothing is said"
    try:
        kit.recompute(nn.Sequential(layer), [])
    except CountError:
        said = "an error"
    before = after(0.1, draw(16, 3))
    right = max(apart(layer.running_mean, before[0]), apart(layer.running_var, before[1])) < RIGHT
    return expect(right and said == "an error", f"{said}; running_mean {show(before[0])} is {show(layer.running_mean)}")


def interrupted(kit: Kit) -> str:
    def loader() -> Iterator[Tensor]:
        yield draw(16, 3, seed=1)
        raise BrokenLoaderError

    layer = kit.BatchNorm1d(3)
    layer(draw(16, 3))
    before = after(0.1, draw(16, 3))
    net = nn.Sequential(layer).eval()
    try:
        kit.recompute(net, loader())
    except BrokenLoaderError:
        pass
    else:
        raise AssertionError("the loader's error is lost")
    kept = max(apart(layer.running_mean, before[0]), apart(layer.running_var, before[1])) < RIGHT
    state = f"momentum {layer.momentum}, {'training' if net.training else 'inference'} mode"
    return expect(
        kept and state == "momentum 0.1, inference mode",
        f"{state}, statistics {'stand' if kept else 'moved'} afterwards",
    )
