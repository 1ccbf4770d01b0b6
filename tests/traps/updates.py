"""Traps in what reaches the running statistics: each check runs a kit's layer and says what was observed."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from support import oracle, tolerances
from traps.kits import RIGHT, Kit, after, apart, draw, expect, show

STEPS = 5000  # enough for an average with momentum 1e-3 to arrive


def one_bad_value(kit: Kit, bad: float) -> str:
    good = draw(8, 3, 4, 4)
    poisoned = good.clone()
    poisoned[0, 1, 0, 0] = bad
    layer = kit.BatchNorm2d(3)
    shown = ~layer(poisoned)[:, 1].isfinite().all()
    for _ in range(20):
        layer(good)
    every, spared = after(0.1, *[good] * 21), after(0.1, *[good] * 20)
    mean, var = (torch.stack([a[0], b[1], a[2]]) for a, b in zip(every, spared, strict=True))
    right = max(apart(layer.running_mean, mean), apart(layer.running_var, var)) < RIGHT
    seen = "shows it" if shown else "hides it"
    return expect(
        bool(shown) and right, f"the output {seen}; 20 good batches later running_mean is {show(layer.running_mean)}"
    )


def checkpointing(kit: Kit, reentrant: bool) -> str:
    layer, x = kit.BatchNorm1d(3), draw(16, 3)
    block = nn.Sequential(layer, nn.Sigmoid())  # the repeated pass stops early where nothing comes after the layer
    checkpoint(block, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    right = layer.num_batches_tracked == 1 and apart(layer.running_mean, after(0.1, x)[0]) < RIGHT
    return expect(right, f"num_batches_tracked is {int(layer.num_batches_tracked)} after one batch")


def without_gradients(kit: Kit) -> str:
    layer, x = kit.BatchNorm1d(3), draw(16, 3)
    with torch.no_grad():
        layer(x)
    right = layer.num_batches_tracked == 1 and apart(layer.running_mean, after(0.1, x)[0]) < RIGHT
    return expect(right, f"num_batches_tracked is {int(layer.num_batches_tracked)} after one batch")


def stalling(kit: Kit, dtype: torch.dtype) -> str:
    layer = kit.BatchNorm1d(1, momentum=1e-3).to(dtype)
    layer.running_mean.fill_(2)
    x = torch.tensor([[3.0], [5.0]]).to(dtype).repeat(4, 1)
    with torch.no_grad():
        for _ in range(STEPS):
            layer(x)
    true = 4 - 2 * (1 - 1e-3) ** STEPS
    right = abs(layer.running_mean.item() - true) < tolerances.MANY_STEPS
    return expect(right, f"from 2 towards 4: at {show(layer.running_mean[0])} where {show(true)} is right")


def half_layers(kit: Kit) -> str:
    layers = [kit.BatchNorm2d(3).half(), kit.BatchNorm2d(3).bfloat16(), kit.BatchNorm2d(3, dtype=torch.float16)]
    kept = {str(t.dtype).removeprefix("torch.") for layer in layers for t in (layer.running_mean, layer.running_var)}
    return expect(kept == {"float32"}, f"running statistics are {', '.join(sorted(kept))}")


def loaded_without_counter(kit: Kit) -> str:
    layer, x = kit.BatchNorm1d(3, momentum=None), draw(64, 3)
    state = layer.state_dict() | {"running_mean": torch.full((3,), 50.0), "running_var": torch.full((3,), 4.0)}
    layer.load_state_dict(state)
    layer(x)
    # What was loaded weighs as much as the batch, if nothing says how many batches it is made of.
    expected = (50 + x.double().mean(0)) / 2
    right = apart(layer.running_mean, expected) < RIGHT
    return expect(right, f"running_mean goes from 50 to {show(layer.running_mean)} in one batch")


def rejected_batch(kit: Kit) -> str:
    layer = kit.BatchNorm1d(3)
    layer(draw(16, 3))
    try:
        layer(draw(1, 3))
    except ValueError:
        pass
    else:
        raise AssertionError("a single value for each channel is not rejected")
    return expect(layer.num_batches_tracked == 1, f"1 batch and a rejected one count {int(layer.num_batches_tracked)}")


def frozen_by_recomputation(kit: Kit) -> str:
    layer = kit.BatchNorm1d(3)
    layer(draw(16, 3))
    before = copy.deepcopy(layer.state_dict())
    kit.freeze(layer)
    update_bn([draw(16, 3, seed=1)], nn.Sequential(layer))
    right = all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    was = show(before["running_mean"])
    return expect(right, f"running_mean {was} is {show(layer.running_mean)} after update_bn")


def micro_batches(kit: Kit) -> str:
    layer, x = kit.BatchNorm2d(3), draw(24, 3, 4, 4) * torch.linspace(0.2, 3, 24).view(-1, 1, 1, 1)
    kit.accumulate(layer, x.split([2, 7, 15]))
    mean, var = after(0.1, x)
    error = max(apart(layer.running_mean, mean), apart(layer.running_var, var))
    return expect(
        error < tolerances.STATISTIC and layer.num_batches_tracked == 1,
        f"3 micro-batches count {int(layer.num_batches_tracked)}; running statistics off by {show(error)}",
    )


def frozen_in_training(kit: Kit) -> str:
    layer = kit.BatchNorm1d(3)
    net = nn.Sequential(layer)
    net(draw(16, 3))
    before = copy.deepcopy(layer.state_dict())
    kit.freeze(layer)
    x = draw(16, 3, seed=1).requires_grad_()
    y = net.train()(x)
    y.sum().backward()
    statistics = [before[key].double().numpy() for key in ("running_mean", "running_var", "weight", "bias")]
    expected = oracle.preactivation(x.detach().double().numpy(), *statistics, None, 1e-5)
    moved = not all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    learns = layer.weight.grad is not None or layer.weight.requires_grad
    error = apart(y, torch.from_numpy(expected))
    return expect(
        not moved and not learns and error < RIGHT,
        f"after .train() statistics {'move' if moved else 'stand'}, gamma {'learns' if learns else 'stands'}, "
        f"the output is off by {show(error)}",
    )


def averaged_copy(kit: Kit) -> str:
    observed = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = kit.BatchNorm1d(1).to(dtype)
        average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
        with torch.no_grad():
            for step in range(STEPS + 1):
                layer.running_mean.fill_(2 if step == 0 else 4)  # the first update copies
                average.update_parameters(layer)
        observed.append(average.module.running_mean.item())
    true = 4 - 2 * 0.999**STEPS
    right = all(abs(value - true) < tolerances.MANY_STEPS for value in observed)
    return expect(right, f"running_mean of the copy is {show(torch.tensor(observed))} where {show(true)} is right")
