"""The forward pass's kernels give the same, in one launch or in parts."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels.triton import operations, plan
from support import tolerances
from support.comparison import close


@pytest.mark.parametrize("shape", [(64, 3), (8, 3, 8)])
def test_one_launch_and_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(shape)
    found = []
    for whole in (plan.WHOLE, 4):
        monkeypatch.setattr(plan, "WHOLE", whole)
        plan.plan_for.cache_clear()
        found.append(operations.forward(x, None, None, None, 1e-5, 1, "silu"))
    plan.plan_for.cache_clear()
    for one, parts in zip(*found, strict=True):
        close(one, parts, tolerances.STATISTIC)
