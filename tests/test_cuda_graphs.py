"""On a GPU: CUDA graphs, streams, several devices, compiled layers, a group of processes; the same bits each time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import batchnorm as bn
from batchnorm.kernels.triton import DTYPES
from support.comparison import close
from support.gpu import DEVICE, PATHS, drawn, needs_a_gpu, needs_triton

pytestmark = needs_a_gpu
OPTIONS = [{}, {"momentum": None}, {"virtual_batch_size": 2}]
WARM_UP = 3  # steps before a graph is recorded: compiling and first allocations are no part of it


def step(layer: bn.BatchNorm, x: Tensor, residual: Tensor, dy: Tensor) -> list[Tensor]:
    y = layer(x, residual=residual)
    return [y, *torch.autograd.grad(y, [x, residual, *layer.parameters()], dy)]


def inputs(path: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, dy = (drawn(path, dtype=dtype, seed=3 * seed + i) for i in range(3))
    return x.requires_grad_(), residual.requires_grad_(), dy


def assert_the_same(actual: list[Tensor], expected: list[Tensor], layers: tuple[bn.BatchNorm, bn.BatchNorm]) -> None:
    """Bit by bit, running statistics as well."""
    states = [list(layer.state_dict().values()) for layer in layers]
    for a, b in zip([*actual, *states[0]], [*expected, *states[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_recorded_training_step_has_the_bits_of_an_eager_one(path: str, options: dict[str, Any]) -> None:
    layer = bn.BatchNorm2d(5, activation="relu", device=DEVICE, **options)
    eager = copy.deepcopy(layer)
    static = inputs(path)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step(layer, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(layer, *static)
    layer.load_state_dict(eager.state_dict())  # as before the warm-up
    for seed in range(3):
        given = inputs(path, seed=seed)
        with torch.no_grad():
            for t, value in zip(static, given, strict=True):
                t.copy_(value)
        graph.replay()
        assert_the_same(recorded, step(eager, *given), (layer, eager))
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_each_time(path: str, dtype: torch.dtype) -> None:
    layers = [bn.BatchNorm2d(5, activation="silu", device=DEVICE) for _ in range(2)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (step(layer, *inputs(path, dtype)) for layer in layers)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_the_same(first, second, (layers[0], layers[1]))


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_of_ones_own(path: str) -> None:
    """The kernels are started where the input is still being computed: on another stream they would not wait for it."""
    layers = [bn.BatchNorm2d(5, activation="relu", device=DEVICE) for _ in range(2)]
    given = inputs(path)
    expected = step(layers[0], *given)
    busy = torch.ones(4096, 4096, device=DEVICE)
    late = torch.zeros_like(given[0])
    step(copy.deepcopy(layers[1]), *given)  # compiled already: starting takes no time
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy @ busy
        late.copy_(given[0].detach())
        actual = step(layers[1], late.requires_grad_(), *given[1:])
    stream.synchronize()
    assert_the_same(actual, expected, (layers[1], layers[0]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("path", PATHS)
def test_a_device_that_is_not_the_current_one(path: str) -> None:
    layers = [bn.BatchNorm2d(5, activation="relu", device=device) for device in ("cuda:0", "cuda:1")]
    given = inputs(path)
    expected = step(layers[0], *given)
    actual = step(layers[1], *(t.detach().to("cuda:1").requires_grad_() for t in given))
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in actual)
    assert_the_same([t.to("cuda:0") for t in actual], expected, (layers[1].to("cuda:0"), layers[0]))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["two launches", "three launches"])
def test_no_copies_of_the_input(path: str, dtype: torch.dtype) -> None:
    """A step needs room for its results, and little more."""
    layer = bn.BatchNorm2d(5, activation="relu", device=DEVICE)
    x, residual, dy = inputs(path, dtype)
    step(layer, x, residual, dy)
    size, slack = x.numel() * x.element_size(), 64 << 10  # of blocks of 512 bytes, for parts, moments and gradients
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x, residual=residual)
    assert torch.cuda.max_memory_allocated() - before <= size + slack
    torch.autograd.grad(y, [x, residual], dy)
    assert torch.cuda.max_memory_allocated() - before <= 3 * size + slack  # y, dx, dresidual


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_compiled(path: str, options: dict[str, Any]) -> None:
    layer = bn.BatchNorm2d(5, activation="silu", device=DEVICE, **options)
    expected, x = copy.deepcopy(layer), drawn(path).requires_grad_()
    torch.compiler.reset()
    y, wanted = torch.compile(layer, fullgraph=True)(x), expected(x)
    close(y, wanted)
    dx, dy = (torch.autograd.grad(output.pow(3).mean(), x)[0] for output in (y, wanted))
    close(dx, dy)
    close(layer.running_mean, expected.running_mean)
    close(layer.running_var, expected.running_var)


@pytest.mark.skipif(not (dist.is_available() and dist.is_nccl_available()), reason="needs a torch with NCCL")
@pytest.mark.parametrize("path", PATHS)
def test_a_group_of_one_process(path: str, tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda:0"))
    try:
        alone = bn.BatchNorm2d(5, activation="silu", device=DEVICE)
        synced = bn.BatchNorm2d(5, activation="silu", device=DEVICE, sync=True)
        given = inputs(path)
        for actual, expected in zip(step(synced, *given), step(alone, *given), strict=True):
            close(actual, expected)
        close(synced.running_var, alone.running_var)
    finally:
        dist.destroy_process_group()
