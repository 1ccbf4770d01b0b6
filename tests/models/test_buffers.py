"""Buffers come back as the same objects with the same values, but for those that are to stay as they have become."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.models.buffers import SavedBuffers


def test_objects_and_values_come_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.LazyBatchNorm1d(), nn.BatchNorm1d(2, device="meta"))
    model.register_buffer("none", None)
    named = {name: id(buffer) for name, buffer in model.named_buffers()}
    saved = SavedBuffers(model)
    model[0].running_mean += 1
    model[0].running_var = torch.zeros(2)
    model[0].register_buffer("new", torch.zeros(1))
    del model[0].num_batches_tracked
    model.none = torch.zeros(1)
    saved.restore()
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == named
    assert model.none is None
    assert model[0].running_mean.tolist() == [0, 0]
    assert model[0].running_var.tolist() == [1, 1]


def test_what_is_accepted_stays() -> None:
    model = nn.BatchNorm1d(2)
    saved = SavedBuffers(model)
    model.running_mean += 1
    model.running_var += 1
    saved.accept(model.running_mean)
    saved.restore()
    assert (model.running_mean.tolist(), model.running_var.tolist()) == ([1, 1], [1, 1])


def test_what_did_not_change_is_not_written() -> None:
    """A graph that saved a buffer would be told that it is another."""
    model = nn.BatchNorm1d(2)
    saved = SavedBuffers(model)
    model.running_mean += 1
    versions = model.running_mean._version, model.running_var._version
    saved.restore()
    assert (model.running_mean._version, model.running_var._version) == (versions[0] + 1, versions[1])


def test_inference_tensors_are_written() -> None:
    with torch.inference_mode():
        model = nn.BatchNorm1d(2)
        saved = SavedBuffers(model)
        model.running_mean += 1
    saved.restore()
    assert model.running_mean.tolist() == [0, 0]
