"""A training step through the kernels never waits for the device: it asks for no value and copies none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batchnorm as bn
from batchnorm import ops
from batchnorm.kernels.backend import Operations
from batchnorm.kernels.triton import operations, passes


class NoWaiting(TorchDispatchMode):
    """Meta tensors stand for a device's. They have no values, asking for one fails by itself; copies are seen here."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        assert "_local_scalar_dense" not in function.__name__
        if "copy" in function.__name__ or "_to_" in function.__name__:
            tensors = [t for t in tree_leaves((args, results)) if isinstance(t, Tensor)]
            assert len({t.device.type for t in tensors}) == 1, f"{function} copies between devices"
        return results


@pytest.fixture(autouse=True)
def by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All calls that the kernels are for go to them, but none is started: the names of those that would have been."""
    kernels, select = Operations(lambda name: getattr(operations, name), eager=True), ops.select

    def chosen(x: Tensor, mask: Tensor | None = None, activation: str | None = None) -> Operations:
        # With a value for every value, as of ghost batches whose masks differ, for the reference: nor may that wait.
        return select(x, mask, activation) if mask is not None and mask.dim() == x.dim() else kernels

    monkeypatch.setattr(ops, "select", chosen)
    started: list[str] = []
    monkeypatch.setattr(passes, "launch", lambda kernel, *_: started.append(kernel.__name__))
    return started


def step(layer: torch.nn.Module, *, memory_format: torch.memory_format, **given: Tensor) -> None:
    x, dy = (torch.empty(8, 4, 32, 48, device="meta").to(memory_format=memory_format) for _ in range(2))
    with NoWaiting():
        layer(x.requires_grad_(), **given).backward(dy)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"virtual_batch_size": 4},
        {"renorm": bn.Renorm()},
        {"track_running_stats": False},
        {"affine": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", ["nothing", "residual", "mask"])
def test_a_training_step(
    options: dict[str, Any], given: str, memory_format: torch.memory_format, by_the_kernels: list[str]
) -> None:
    layer = bn.BatchNorm2d(4, activation="relu", device="meta", **options)
    inputs = {}
    if given == "residual":
        inputs["residual"] = torch.empty(8, 4, 32, 48, device="meta").to(memory_format=memory_format).requires_grad_()
    if given == "mask":
        inputs["mask"] = torch.ones(8, 32, 48, device="meta", dtype=torch.bool)
    step(layer, memory_format=memory_format, **inputs)
    assert by_the_kernels
    by_the_kernels.clear()
    with NoWaiting(), torch.no_grad():
        layer.eval()(torch.empty(8, 4, 32, 48, device="meta"))
    assert by_the_kernels


def test_deferred(by_the_kernels: list[str]) -> None:
    layer = bn.BatchNorm2d(4, activation="relu", device="meta")
    with NoWaiting(), bn.deferred(layer):
        for _ in range(2):
            step(layer, memory_format=torch.contiguous_format)
        before = len(by_the_kernels)
    assert by_the_kernels[before:] == ["commit_kernel"]


def test_what_waits_is_noticed() -> None:
    x = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="item"), NoWaiting():
        x.sum().item()
    with pytest.raises(AssertionError, match="copies between devices"), NoWaiting():
        torch.ones(3).to("meta")
