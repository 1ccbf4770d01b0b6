"""The layers of a model, or of a state_dict, and their state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.observation import Input, Observation, ObservedLayer
from batchnorm.diagnosis.subject import subject_of_model, subject_of_state_dict


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"first-one": nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4, momentum=None))})
        self.out = nn.SyncBatchNorm(4, eps=1e-3, affine=False)
        self.again = self.out


def test_a_models_layers() -> None:
    model = Nested()
    inner, out = subject_of_model(model).layers
    assert (inner.name, inner.path) == ("blocks.first-one.1", 'model.blocks.get_submodule("first-one")[1]')
    assert eval(inner.path) is inner.module is inner.ours
    assert (inner.momentum, inner.eps, inner.num_batches_tracked, inner.num_channels) == (None, 1e-5, 0, 4)
    assert inner.mean is model.blocks["first-one"][1].running_mean
    assert inner.weight is model.blocks["first-one"][1].weight
    assert (out.name, out.path, out.ours, out.weight, out.bias, out.eps) == ("out", "model.out", None, None, None, 1e-3)
    (alone,) = subject_of_model(nn.BatchNorm1d(3, track_running_stats=False)).layers
    assert (alone.name, alone.path, alone.mean, alone.num_batches_tracked, alone.num_channels) == (
        "",
        "model",
        None,
        None,
        3,
    )


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_state_dicts_layers(prefix: str) -> None:
    state = {f"{prefix}{key}": value for key, value in Nested().state_dict().items()}
    state |= {f"{prefix}odd.running_mean": torch.zeros(3), "step": 3, f"{prefix}other.running_mean": "text"}
    layers = subject_of_state_dict(state).layers
    assert [layer.name for layer in layers] == [f"{prefix}blocks.first-one.1", f"{prefix}out", f"{prefix}again"]
    assert layers[0].num_batches_tracked == 0
    assert layers[0].weight is state[f"{prefix}blocks.first-one.1.weight"]
    assert layers[1].weight is None
    assert layers[0].module is None
    (root,) = subject_of_state_dict(nn.BatchNorm1d(3).state_dict()).layers
    assert root.name == ""


def test_what_was_observed() -> None:
    subject = subject_of_model(Nested())
    assert subject.observed() == []
    layer = ObservedLayer(Input((9, 4), torch.float32, False, 1))
    subject.data = Observation({"out": layer})
    assert subject.observed() == [(subject.layers[1], layer)]
