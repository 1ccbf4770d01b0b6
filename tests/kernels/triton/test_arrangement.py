"""How inputs lie: themselves where they have no gaps, and results with torch's strides."""

from __future__ import annotations

import pytest
import torch

from batchnorm import layout
from batchnorm.kernels.triton.arrangement import arrange
from support.samples import LAYOUTS, Layout


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_results_have_torchs_strides(case: Layout) -> None:
    x = case.arrange(torch.randn(case.shape))
    arrangement = arrange(x, case.channel_dim)
    assert arrangement.new().stride() == layout.laid_out(x, x).stride()
    assert torch.equal(arrangement.x, x)
    copied = arrangement.x.data_ptr() != x.data_ptr()
    assert copied == (case.memory in ("permuted", "gaps", "expanded"))
    outer, channels, inner = arrangement.sizes
    assert outer * channels * inner == x.numel()
    assert channels == case.channels


def test_sizes_are_those_of_memory() -> None:
    x = torch.randn(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    assert arrange(x, 1).sizes == (2, 3, 20)
    assert arrange(x, -1).sizes == (24, 5, 1)
    assert arrange(last, 1).sizes == (40, 3, 1)
    assert arrange(last, -1).sizes == (8, 5, 3)


def test_a_mask_follows_the_positions() -> None:
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    mask = torch.rand(2, 3, 4)  # for channels in the last dimension
    positions = arrange(last, -1).positions(mask)
    assert positions is not None
    assert torch.equal(positions, mask.permute(0, 2, 1))
    assert positions.is_contiguous()
    booleans = arrange(last, 1).positions(torch.rand(2, 4, 5) > 0.5)
    assert booleans is not None
    assert booleans.dtype == torch.uint8
