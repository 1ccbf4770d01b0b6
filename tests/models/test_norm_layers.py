"""A model's batch-norm layers: ours, torch's, once each, the model itself included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.models.norm_layers import display_name, named_norm_layers, split_by_origin, unwrapped


class Own(nn.BatchNorm2d):
    """A subclass of a user."""


def test_layers_of_all_depths_and_classes_in_order() -> None:
    shared = bn.BatchNorm1d(2)
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Sequential(nn.SyncBatchNorm(2), Own(2), nn.LayerNorm(2)), shared)
    assert list(named_norm_layers(model)) == [("1", shared), ("2.0", model[2][0]), ("2.1", model[2][1])]
    assert split_by_origin(model) == ([shared], ["2.0", "2.1"])


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), bn.BatchNorm(3)])
def test_the_model_may_be_a_layer(layer: nn.Module) -> None:
    assert list(named_norm_layers(layer)) == [("", layer)]
    assert split_by_origin(layer) in (([layer], []), ([], ["the model itself"]))


def test_names() -> None:
    assert [display_name(path) for path in ("", "a.b")] == ["the model itself", "a.b"]


def test_the_model_inside() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    compiled = torch.compile(model, backend="eager")
    for wrapped in (
        model,
        compiled,
        nn.DataParallel(model),
        nn.DataParallel(compiled),
        torch.compile(nn.DataParallel(model)),
    ):
        assert unwrapped(wrapped) is model
