"""The table of plans: everything is gone through once, in as many launches as it says."""

from __future__ import annotations

import pytest

from batchnorm.kernels.triton.plan import PROGRAMS, TILE, WHOLE, plan_for


@pytest.mark.parametrize(
    ("sizes", "whole", "last"),
    [
        ((256, 64, 49 * 64), False, False),
        ((32, 64, 49), True, False),
        ((802816, 64, 1), False, True),
        ((1024, 512, 1), True, True),
        ((1025, 512, 1), False, True),
        ((1, 1, 90_000), False, False),
        ((1, 1, 8192), True, False),
    ],
)
def test_the_path(sizes: tuple[int, int, int], whole: bool, last: bool) -> None:
    plan = plan_for(*sizes)
    assert (plan.whole, plan.last) == (whole, last)
    assert plan.splits == 1 or not whole


@pytest.mark.parametrize("outer", [1, 3, 64, 1000, 70_001])
@pytest.mark.parametrize("channels", [1, 3, 64, 2048])
@pytest.mark.parametrize("inner", [1, 2, 49, 3136])
def test_tiles_cover_everything(outer: int, channels: int, inner: int) -> None:
    plan = plan_for(*((1, 1, outer * inner) if channels == 1 else (outer, channels, inner)))
    assert plan.rows * plan.columns <= (WHOLE if plan.whole else TILE)
    assert (plan.splits - 1) * plan.per_split < plan.tiles <= plan.splits * plan.per_split
    assert plan.splits * plan.blocks <= PROGRAMS + plan.blocks
    values = plan.tiles * plan.rows * plan.columns * plan.blocks
    assert values >= outer * channels * inner
    assert 32 * plan.warps * 16 >= min(plan.rows * plan.columns, 512)
