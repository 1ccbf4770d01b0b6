"""On a GPU: the same results as the oracle's, and nothing that waits for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels import triton
from batchnorm.memory import session
from support import oracle, tolerances
from support.comparison import close
from support.gpu import DEVICE, PATHS, OnTheDevice, draw, drawn, needs_a_gpu, needs_triton, without_waiting
from support.networks import Block, used
from support.operations import assert_the_oracles, assert_the_oracles_of_what_counts, masks
from support.passes import gradients, residual, same_bits
from support.passes import images as pictures
from support.populations import assert_consistent, images, made
from support.samples import LAYOUTS, Layout, Sample

pytestmark = needs_a_gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LARGE = [
    Layout("(N, C, H, W) large", (3, 5, 60, 70)),
    Layout("(N, C, H, W) large, channels_last", (3, 5, 60, 70), 1, "channels_last"),
    Layout("(N, C) large", (9001, 20)),
]
SAMPLES = [Sample(layout, "relu", True) for layout in (*LAYOUTS, *LARGE)]
SAMPLES += [Sample(layout, "silu", True, dtype) for layout in (LAYOUTS[6], *LARGE) for dtype in DTYPES]
SAMPLES += [Sample(LAYOUTS[6], activation, True) for activation in ACTIVATIONS if activation != "relu"]
SAMPLES += [Sample(layout, None, residual, affine=False) for layout in LARGE for residual in (False, True)]


@needs_triton
def test_the_kernels_serve() -> None:
    served = {row.dtype: row.implementation for row in bn.kernels() if row.device == "cuda"}
    for dtype in triton.DTYPES:
        assert served[str(dtype).removeprefix("torch.")].startswith("triton")
    assert served.get("float64", "reference") == "reference"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_every_operation(sample: Sample) -> None:
    assert_the_oracles(OnTheDevice(sample), sample)


@pytest.mark.parametrize("kind", ["bool", "float16", "float32", "float64"])
@pytest.mark.parametrize("layout", [LAYOUTS[6], LAYOUTS[7], *LARGE], ids=lambda layout: layout.name)
def test_every_operation_with_a_mask(layout: Layout, kind: str) -> None:
    sample = Sample(layout, "silu", True)
    assert_the_oracles_of_what_counts(OnTheDevice(sample, masks(sample)[kind]), sample, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", [None, "silu"])  # without kinks, of which rounding can be on either side
def test_a_training_step(dtype: torch.dtype, path: str, activation: str | None) -> None:
    layer = bn.BatchNorm2d(5, activation=activation, device=DEVICE, dtype=dtype)
    x, residual, dy = (drawn(path, dtype=dtype, seed=i) for i in range(3))
    x.requires_grad_()
    with without_waiting():
        y = layer(x, residual=residual)
        y.backward(dy)
    arrays = [t.detach().double().cpu().numpy() for t in (x, layer.weight, layer.bias, residual)]
    expected, mean, m2 = oracle.forward(*arrays, activation=activation)
    n = x.numel() / 5
    gradient = dy.double().cpu().numpy()
    dx, _, dweight, dbias = oracle.backward(gradient, arrays[0], mean, m2 / n, *arrays[1:], activation=activation)
    assert y.stride() == x.stride()
    for actual, wanted in ((y, expected), (x.grad, dx)):
        assert actual.dtype == dtype
        close(actual, wanted)
    for actual, wanted in ((layer.weight.grad, dweight), (layer.bias.grad, dbias)):
        assert actual.dtype == dtype
        close(actual, wanted, absolute=tolerances.SUM_PER_ROOT * n**0.5, rounded=True)
    close(layer.running_mean, 0.1 * mean)
    close(layer.running_var, 0.9 + 0.1 * m2 / (n - 1))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask(kind: torch.dtype) -> None:
    layer, x = bn.BatchNorm1d(5, device=DEVICE), draw(4, 5, 9)
    mask = (torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) > 0.4).to(kind)
    on_device = mask.to(DEVICE)
    with without_waiting():
        y = layer(x, mask=on_device)
    expected, mean, _ = oracle.forward(
        x.double().cpu().numpy(),
        *(p.detach().double().cpu().numpy() for p in layer.parameters()),
        weights=mask.double().numpy(),
    )
    close(y, expected)
    close(layer.running_mean, 0.1 * mean)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"virtual_batch_size": 2}, {"renorm": bn.Renorm()}, {"track_running_stats": False}]
)
def test_options_compute_as_on_the_cpu(options: dict[str, Any], path: str) -> None:
    here, there = bn.BatchNorm2d(5, **options), bn.BatchNorm2d(5, **options).to(DEVICE)
    for seed in range(3):
        x = drawn(path, seed=seed)
        with without_waiting():
            y = there(x)
        close(y.cpu(), here(x.cpu()))
    for a, b in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
        close(a.cpu(), b, tolerances.STATISTIC)


@pytest.mark.parametrize("path", PATHS)
def test_several_passes_are_committed_as_one(path: str) -> None:
    here, there = bn.BatchNorm2d(5), bn.BatchNorm2d(5, device=DEVICE)
    for layer in (here, there):
        with bn.deferred(layer):
            for seed in range(3):
                layer(drawn(path, seed=seed).to(layer.weight.device))
    assert there.num_batches_tracked == 1
    for a, b in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
        close(a.cpu(), b, tolerances.STATISTIC)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("path", PATHS)
def test_a_channel_that_is_not_finite_is_held_back(path: str, bad: float) -> None:
    layer, clean, x = bn.BatchNorm2d(5, device=DEVICE), bn.BatchNorm2d(5, device=DEVICE), drawn(path)
    expected = clean(x)
    x[0, 1, 0, 0] = bad
    with without_waiting():
        y = layer(x)
    assert layer.num_batches_skipped.tolist() == [0, 1, 0, 0, 0]
    assert y[:, 1].isnan().all()
    others = [0, 2, 3, 4]
    assert torch.equal(y[:, others], expected[:, others])
    assert torch.equal(layer.running_mean[others], clean.running_mean[others])
    assert (layer.running_mean[1], layer.running_var[1]) == (0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_memory_that_is_not_aligned(path: str, dtype: torch.dtype) -> None:
    """A tensor that begins one value into its storage, where loads of 16 bytes would be wrong."""
    x = drawn(path, dtype=dtype)
    storage = torch.zeros(x.numel() + 1, dtype=dtype, device=DEVICE)
    shifted = storage[1:].as_strided(x.size(), x.stride(), 1).copy_(x)
    layers = [bn.BatchNorm2d(5, activation="silu", device=DEVICE) for _ in range(2)]
    results = []
    for layer, given in zip(layers, (shifted, x), strict=True):
        given = given.detach().requires_grad_()
        y = layer(given)
        results.append([y, *torch.autograd.grad(y.square().mean(), [given, *layer.parameters()]), layer.running_var])
    assert shifted.data_ptr() % 16 != 0
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (4, 5, 0, 3)])
def test_an_input_without_values(shape: tuple[int, ...]) -> None:
    layer = bn.BatchNorm2d(5, activation="relu", device=DEVICE)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_inference_in_place() -> None:
    x = draw(4, 5, 7, 3)
    layer = bn.BatchNorm2d(5, activation="relu", device=DEVICE)
    layer(x)
    statistics = layer.running_mean, layer.running_var
    expected = layer.eval()(x).detach()
    with torch.no_grad(), without_waiting():
        y = bn.functional.batch_norm(x, *statistics, layer.weight, layer.bias, activation="relu", inplace=True)
    assert y.data_ptr() == x.data_ptr()
    close(x, expected)


def test_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(DEVICE)
    ours, x = bn.convert(copy.deepcopy(model)), draw(4, 3, 9, 9)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual, expected = ours(x), model(x)
    close(actual, expected)


def test_surgery() -> None:
    model, x = used(nn.Sequential(Block(3), nn.Flatten(2))).to(DEVICE), draw(4, 3, 8, 8)
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
    bn.recalibrate(there.to(DEVICE), batches, method=method)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_recomputed_outputs_have_the_same_bits(
    dtype: torch.dtype, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(session, "_LEAST", 2**14)  # outputs are small here
    net = residual(3).to(DEVICE, dtype, memory_format=memory_format)
    x = pictures().to(DEVICE, dtype, memory_format=memory_format)
    expected = gradients(copy.deepcopy(net), x)
    net.zero_grad()
    handle = bn.recompute(net)
    found = gradients(net, x)
    assert dtype == torch.float64 or len(handle.report.recomputed) > 5  # float64 is torch's there
    same_bits(found, expected)
