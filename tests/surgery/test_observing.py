"""What example inputs show of a model's calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.observing import ModuleCall, Spec, forward, observe
from support.networks import Calls

F32 = torch.float32


class Optional(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
        return x * factor if y is None else x + y


def test_calls_are_seen_in_order() -> None:
    model = Calls(lambda m, x: m.a(m.b(m.a(x), y=x), factor=2.0), a=Optional(), b=Optional())
    calls, _ = observe(model, torch.zeros(2, 3))
    spec = Spec((2, 3), F32)
    assert calls[model] == [ModuleCall((spec,), {})]
    assert calls[model.a] == [ModuleCall((spec,), {}), ModuleCall((spec,), {"factor": 2.0})]
    assert calls[model.b] == [ModuleCall((spec,), {"y": spec})]
    assert not calls[model.a][0].alike(calls[model.a][1])
    assert calls[model][0].alike(ModuleCall((Spec((5, 7), torch.float64),), {}))


def test_observing_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    observe(model, torch.randn(4, 3))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert model[0].num_batches_tracked == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shape"):
        observe(model, torch.randn(4, 5))
    assert model[0].training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_how_a_model_is_called() -> None:
    model, x = Optional(), torch.ones(1)
    assert forward(model, x) == 1
    assert forward(model, (x, x)) == 2
    assert forward(model, [x]) == 1
    assert forward(model, {"x": x, "factor": 4.0}) == 4
    with pytest.raises(bn.BatchNormError, match="got example_inputs of int"):
        forward(model, 3)
