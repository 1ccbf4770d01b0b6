"""As many launches as the plan's table says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchnorm.kernels.triton import operations, passes


@pytest.mark.parametrize(
    ("shape", "memory_format", "launches"),
    [
        ((256, 64, 56, 56), torch.contiguous_format, 2),
        ((256, 64, 56, 56), torch.channels_last, 3),
        ((8, 64, 16, 32), torch.contiguous_format, 1),
        ((128, 64, 1, 1), torch.contiguous_format, 1),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_launches(
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    launches: int,
    momentum: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    monkeypatch.setattr(passes, "launch", lambda kernel, *_: started.append(kernel.__name__))
    x, v = torch.empty(shape, device="meta").to(memory_format=memory_format), torch.empty(shape[1], device="meta")
    options: tuple[Any, ...] = (v, v, x, 1e-5, 1, "relu")
    tracked = torch.empty((), device="meta", dtype=torch.int64)
    _, *moments = operations.forward_commit(x, *options, None, v, v, tracked, None, momentum)
    assert len(started) == launches + (momentum is None)
    started.clear()
    operations.backward(x, x, *moments, *options)
    assert len(started) == launches
