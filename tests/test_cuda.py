"""On a GPU: the same results as the oracle's, and nothing that waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from support import oracle, tolerances
from support.comparison import close
from support.networks import Block, used
from support.populations import assert_consistent, images, made

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def without_waiting() -> Iterator[None]:
    """An operation inside that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3).to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_training_step(dtype: torch.dtype, memory_format: torch.memory_format, activation: str | None) -> None:
    layer = bn.BatchNorm2d(5, activation=activation, device="cuda", dtype=dtype)
    x, residual, dy = (draw(4, 5, 7, 3, dtype=dtype, seed=i).to(memory_format=memory_format) for i in range(3))
    x.requires_grad_()
    with without_waiting():
        y = layer(x, residual=residual)
        y.backward(dy)
    arrays = [t.detach().double().cpu().numpy() for t in (x, layer.weight, layer.bias, residual)]
    expected, mean, m2 = oracle.forward(*arrays, activation=activation)
    gradient = dy.double().cpu().numpy()
    dx, _, dweight, dbias = oracle.backward(gradient, arrays[0], mean, m2 / 84, *arrays[1:], activation=activation)
    assert y.is_contiguous(memory_format=memory_format)
    for actual, wanted in ((y, expected), (x.grad, dx), (layer.weight.grad, dweight), (layer.bias.grad, dbias)):
        assert actual.dtype == dtype
        close(actual, wanted)
    close(layer.running_mean, 0.1 * mean)
    close(layer.running_var, 0.9 + 0.1 * m2 / 83)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask(kind: torch.dtype) -> None:
    layer, x = bn.BatchNorm1d(5, device="cuda"), draw(4, 5, 9)
    mask = (torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) > 0.4).to(kind)
    y = layer(x, mask=mask.cuda())
    expected, mean, _ = oracle.forward(
        x.double().cpu().numpy(),
        *(p.detach().double().cpu().numpy() for p in layer.parameters()),
        weights=mask.double().numpy(),
    )
    close(y, expected)
    close(layer.running_mean, 0.1 * mean)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"virtual_batch_size": 2}, {"renorm": bn.Renorm()}, {"track_running_stats": False}]
)
def test_options_compute_as_on_the_cpu(options: dict[str, Any]) -> None:
    here, there = bn.BatchNorm2d(5, **options), bn.BatchNorm2d(5, **options).cuda()
    for seed in range(3):
        x = draw(4, 5, 6, 6, seed=seed)
        close(there(x).cpu(), here(x.cpu()))
    for a, b in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
        close(a.cpu(), b, tolerances.STATISTIC)


def test_a_channel_that_is_not_finite_is_skipped() -> None:
    layer, x = bn.BatchNorm1d(3, device="cuda"), draw(8, 3)
    x[0, 1] = torch.inf
    with without_waiting():
        layer(x)
    assert layer.num_batches_skipped.tolist() == [0, 1, 0]
    assert layer.running_mean.isfinite().all()


def test_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).cuda()
    ours, x = bn.convert(copy.deepcopy(model)), draw(4, 3, 9, 9)
    with torch.autocast("cuda", torch.bfloat16):
        actual, expected = ours(x), model(x)
    close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"virtual_batch_size": 2}])
def test_compiled(options: dict[str, Any]) -> None:
    layer = bn.BatchNorm2d(5, activation="silu", device="cuda", **options)
    expected, x = copy.deepcopy(layer), draw(4, 5, 7, 3).requires_grad_()
    y, wanted = torch.compile(layer, fullgraph=True)(x), expected(x)
    close(y, wanted)
    dx, dy = (torch.autograd.grad(output.pow(3).mean(), x)[0] for output in (y, wanted))
    close(dx, dy)
    close(layer.running_var, expected.running_var)


def test_surgery() -> None:
    model, x = used(nn.Sequential(Block(3), nn.Flatten(2))).cuda(), draw(4, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    folded = bn.fold(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    close(folded(x), expected)
    fused = bn.fuse(copy.deepcopy(model))
    close(fused(x), expected)
    bn.revert(bn.convert(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["exact", "pooled", "average"])
def test_population_statistics(method: str) -> None:
    torch.manual_seed(0)
    here, there = made("residual"), made("residual")
    there.load_state_dict(here.state_dict())
    batches = images(4, 3, 5, 2)
    bn.recalibrate(there.cuda(), batches, method=method)
    bn.recalibrate(here, batches, method=method)
    if method == "exact":
        assert_consistent(there.cpu(), batches)
    for a, b in zip(there.cpu().buffers(), here.buffers(), strict=True):
        if method != "average" or a.shape != (5,):  # after dropout, for which each device draws numbers of its own
            close(a, b, tolerances.CONVOLVED)


def test_a_monitor_waits_for_the_device_in_recorded_steps_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), bn.BatchNorm(4), nn.Flatten()).cuda()
    there = copy.deepcopy(model).cpu()
    x = draw(4, 3, 8, 8)

    def step(model: nn.Module, x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    with bn.Monitor(model, every=3) as monitor, bn.Monitor(there, every=3) as expected:
        for i in range(1, 6):
            torch.cuda.set_sync_debug_mode("default" if i % 3 in (0, 1) else "error")  # a record is written after it
            step(model, x)
            torch.cuda.set_sync_debug_mode("default")
            step(there, x.cpu())
    assert [(r.step, r.layer) for r in monitor.records] == [(3, "1"), (3, "3")]
    for one, other in zip(monitor.records, expected.records, strict=True):
        close(one.batch_mean, other.batch_mean, tolerances.CONVOLVED)
