"""Which linear layers feed batch-norm layers alone: their scale makes no difference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.feeding import scale_invariant
from batchnorm.diagnosis.subject import subject_of_model
from diagnosis.checking import draw
from support.networks import Block, Untraceable


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_a_multiple_of_what_is_found_has_the_same_output_in_training(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(3, norm, projected=True), Block(3, norm)).double(), draw(4, 3, 5, 5).double()
    found = scale_invariant(subject_of_model(model, example=x))
    layers = {model[0].bn1, model[0].bn2, model[0].downsample[1], model[1].bn1, model[1].bn2}
    assert set(found) == layers
    assert found[model[1].bn2].module is model[1].conv2
    for norm_layer in layers:
        norm_layer.eps = 1e-15
    y = model.train()(x)
    with torch.no_grad():
        for layer in found.values():
            layer.module.weight *= 3
    torch.testing.assert_close(model(x), y)


def test_nothing_without_a_model_or_an_example() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert not scale_invariant(subject_of_model(model))
    assert scale_invariant(subject_of_model(model, example=draw(4, 3)))
    lazy = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))
    assert not scale_invariant(subject_of_model(lazy, example=draw(4, 3)))
    assert isinstance(lazy[0].weight, nn.UninitializedParameter)


def test_parts_of_what_cannot_be_traced_and_compiled_models() -> None:
    part = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = Untraceable(part, nn.BatchNorm1d(3))
    assert list(scale_invariant(subject_of_model(model, example=draw(4, 3)))) == [part[1]]
    compiled = torch.compile(part, backend="eager")
    assert list(scale_invariant(subject_of_model(compiled, example=draw(4, 3)))) == [part[1]]


def test_layers_that_normalise_by_something_else_or_do_anything_are_left_out() -> None:
    class Subclass(nn.BatchNorm1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input

    model = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3), nn.Linear(3, 3), Subclass(3))
    assert list(scale_invariant(subject_of_model(model, example=draw(4, 3)))) == [model[1]]
    bn.freeze(model[1])
    assert not scale_invariant(subject_of_model(model, example=draw(4, 3)))


def test_channels_in_another_place_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert not scale_invariant(subject_of_model(model, example=draw(5, 4, 4)))
    last = nn.Sequential(nn.Linear(4, 4), bn.BatchNorm1d(4, channel_dim=-1))
    assert scale_invariant(subject_of_model(last, example=draw(5, 4, 4)))
