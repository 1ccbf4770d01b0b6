"""Who feeds a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.graph import Graph, graph
from batchnorm.diagnosis.observation import Observation
from batchnorm.diagnosis.subject import Subject, subject_of_model, subject_of_state_dict
from batchnorm.surgery.linear import LinearLayer
from diagnosis.observed import draw
from support.networks import Calls, Untraceable


def made(model: nn.Module, **rest: Any) -> tuple[Graph, Subject]:
    found = graph(subject := subject_of_model(model, **rest))
    assert found is not None
    return found, subject


def test_upwards_as_far_as_it_goes() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(4))
    found, subject = made(model)
    (call,) = found.calls(subject.layers[0])
    assert [met.kind for met in found.upstream(call)] == ["reshape"]
    assert [met.kind for met in found.upstream(call, "reshape")] == ["reshape", "elementwise"]
    through = ("reshape", "elementwise", "linear", "dropout")
    assert [found.where(met) for met in found.upstream(call, *through)][:4] == ["3", "2", "1", "0"]


def test_both_branches_of_a_sum_each_once() -> None:
    model = Calls(lambda m, x: m.norm(m.a(x) + m.b(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))
    found, subject = made(model)
    met = list(found.upstream(found.calls(subject.layers[0])[0], "join", "linear"))
    assert sorted(one.kind for one in met) == ["input", "join", "linear", "linear"]
    assert found.where(met[0]) == "add in the model itself"


def test_it_is_made_once() -> None:
    subject = subject_of_model(nn.Sequential(nn.BatchNorm1d(4)))
    assert graph(subject) is graph(subject)
    assert graph(subject_of_state_dict(nn.BatchNorm1d(4).state_dict())) is None


def test_an_example_shows_shapes_and_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    data = Observation(batches=4, samples=64)
    found, subject = made(model, data=data, example=draw(16, 4, 4))
    assert isinstance(made(model)[0].dead_biases["1"], LinearLayer)
    assert isinstance(found.dead_biases["1"], str)
    assert subject.data is not None
    assert subject.data.passes == 2 / 64


def test_a_model_that_needs_a_whole_batch() -> None:
    seen = []

    def forward(model: nn.Module, batch: Any) -> object:
        seen.append(len(batch))
        return model(batch.view(4, 4, 4))

    found, _ = made(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), example=draw(16, 4), forward=forward)
    assert seen == [2, 16]
    assert isinstance(found.dead_biases["1"], str)


def test_a_forward_that_fails_leaves_what_needs_no_example() -> None:
    def forward(model: nn.Module, batch: Any) -> object:
        model.train()
        torch.rand(1)
        raise RuntimeError("no")

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    stream = torch.get_rng_state()
    found, _ = made(model, example=draw(16, 4), forward=forward)
    assert isinstance(found.dead_biases["1"], LinearLayer)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_before(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), bn.BatchNorm1d(4), nn.Dropout()).train(training)
    model[2].train(not training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    made(model, example=draw(16, 4))
    assert [m.training for m in model] == [training, training, not training]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_traced_has_no_calls() -> None:
    found, subject = made(Untraceable(nn.BatchNorm1d(4)))
    assert found.calls(subject.layers[0]) == []


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("wrap", [Wrapped, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_are_those_of_the_whole(wrap: Any) -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    for rest in ({}, {"example": draw(16, 4)}):
        found, subject = made(model, **rest)
        (layer,) = subject.layers
        source = found.dead_biases[layer.name]
        assert isinstance(source, LinearLayer)
        assert model.get_submodule(found.names[source.module]) is source.module
