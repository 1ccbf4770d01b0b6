"""Tiles that are larger than what is there leave the rest alone."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels.triton import operations


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 7)])
def test_nothing_is_written_beyond_the_input(shape: tuple[int, ...], small: None) -> None:
    room = torch.full((2 * torch.Size(shape).numel(),), 7.0)
    x = room[: torch.Size(shape).numel()].view(shape)
    zero, one = torch.zeros(shape[1]), torch.ones(shape[1])
    operations.normalize_(x, zero, one, None, None, None, 0.0, 1, None)
    assert torch.equal(room, torch.full_like(room, 7.0))
    operations.normalize_(x, one, one, None, None, None, 0.0, 1, None)
    assert torch.equal(x, torch.full(shape, 6.0))
    assert torch.equal(room[x.numel() :], torch.full((x.numel(),), 7.0))
