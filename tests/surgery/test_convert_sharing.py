"""Converted layers whose statistics processes share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.convert import convert
from support import tolerances

SHAPES = [(6, 4), (6, 4, 5, 3), (6, 4, 2, 3, 2)]
OPTIONS: list[dict[str, Any]] = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sync_layer_takes_any_rank_as_before(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    group = object()
    layer = nn.SyncBatchNorm(4, process_group=group, **options)
    converted = convert(layer)
    assert converted is layer
    assert type(converted) is bn.BatchNorm
    assert converted.sync
    assert converted.process_group is group
    converted.process_group = None
    x = torch.randn(shape) * 2 + 1
    plain = nn.BatchNorm1d(4, **options)  # torch's refuses CPU tensors
    plain._check_input_dim = lambda x: None
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    for training in (True, True, False):
        actual, expected = (layer.train(training)(x) for layer in (converted, plain))
        torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)
    for actual, expected in zip(converted.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)


def test_layers_share_when_asked() -> None:
    group = object()
    model = convert(nn.ModuleDict({"plain": nn.BatchNorm2d(4), "sync": nn.SyncBatchNorm(4)}), sync=True)
    assert [(m.sync, m.process_group) for m in model.values()] == [(True, None)] * 2
    model = convert(
        nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4, process_group=1)), sync=True, process_group=group
    )
    assert [m.process_group for m in model] == [group, 1]


def test_ours_that_do_not_share_are_named() -> None:
    model = nn.Sequential(bn.BatchNorm2d(4), bn.BatchNorm2d(4, sync=True), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"left as they are: 0 \(BatchNorm2d, ours already, with sync=False\)\. Only"):
        convert(model, sync=True)
    assert [m.sync for m in model] == [False, True, True]


def test_a_sync_layer_is_left_by_ghost_batches() -> None:
    with pytest.warns(
        UserWarning, match="SyncBatchNorm, whose statistics processes share: ghost batches are the contr"
    ):
        assert type(convert(nn.SyncBatchNorm(4), virtual_batch_size=2)) is nn.SyncBatchNorm
