"""Attributes are read by path, and what a forward set on modules or kept in their containers is undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.models.attributes import attribute_at, preserved_attributes


def test_paths() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    assert attribute_at(model, "0.0.weight") is model[0][0].weight
    assert attribute_at(model, "0") is model[0]


def cache() -> nn.Module:
    module = nn.ReLU()
    module.kept, module.names, module.last = [{"a": 1}], {"x"}, None
    return module


def test_changes_are_undone_and_named() -> None:
    model = nn.Sequential(cache())
    kept = model[0].kept
    before = {**vars(model[0])}

    def changes() -> None:
        with preserved_attributes(model) as changed:
            found.append(changed)
            model[0].kept[0]["b"] = torch.zeros(1)
            model[0].names.add("y")
            model[0].last = 3
            model[0].new = 4
            model[0].register_buffer("buffer", torch.zeros(1))
            raise KeyError

    found: list[set[str]] = []
    with pytest.raises(KeyError):
        changes()
    assert found == [{"kept", "names", "last", "new", "buffer"}]
    assert {**vars(model[0])} == before
    assert kept == [{"a": 1}]
    assert model[0].names == {"x"}
    assert not model[0]._buffers


def test_nothing_changed() -> None:
    model = cache()
    with preserved_attributes(model) as changed:
        model(torch.zeros(1))
    assert changed == set()
