"""Tests on a GPU: tensors as they lie there, and nothing that waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm import ops
from batchnorm.kernels import triton
from support.samples import Sample

DEVICE = "cuda"
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
needs_triton = pytest.mark.skipif(not triton.AVAILABLE, reason=f"needs the kernels: {triton.UNAVAILABLE_REASON}")

# Shapes that the kernels go through in one launch, in two and in three, the last ones in several parts a channel.
PATHS = {
    "one launch": ((4, 5, 7, 3), torch.contiguous_format),
    "one launch, channels last": ((4, 5, 7, 3), torch.channels_last),
    "two launches": ((3, 5, 60, 70), torch.contiguous_format),
    "three launches": ((3, 5, 60, 70), torch.channels_last),
}


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
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3).to(DEVICE, dtype)


def drawn(path: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A tensor for one of `PATHS`."""
    shape, memory_format = PATHS[path]
    return draw(*shape, dtype=dtype, seed=seed).to(memory_format=memory_format)


def moved(t: Tensor) -> Tensor:
    """The same on the device, with its strides, whatever they are."""
    storage = t.untyped_storage()
    there = torch.empty(storage.nbytes(), dtype=torch.uint8, device=DEVICE)
    there.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    return torch.empty(0, dtype=t.dtype, device=DEVICE).set_(
        there.untyped_storage(), t.storage_offset(), t.size(), t.stride()
    )


class OnTheDevice:
    """The operations that serve a sample on the device; given tensors of the CPU, which go there, they return such."""

    def __init__(self, sample: Sample, mask: Tensor | None = None) -> None:
        x = moved(sample.tensors()["x"])
        self._operations = ops.select(x, None if mask is None else moved(mask), sample.activation)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            results = getattr(self._operations, name)(*(moved(a) if isinstance(a, Tensor) else a for a in arguments))
            return results.cpu() if isinstance(results, Tensor) else tuple(t.cpu() for t in results)

        return call
