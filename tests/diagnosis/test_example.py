"""The network with faults that `batchnorm check` shows."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.diagnosis.example import digits, example
from batchnorm.models.norm_layers import named_norm_layers
from batchnorm.population.recalibrate import recalibrate


def test_the_faults_are_where_they_were_planted() -> None:
    model, batches, _ = example()
    layers: dict[str, nn.BatchNorm2d] = dict(named_norm_layers(model))  # type: ignore[arg-type]
    assert [name for name, layer in layers.items() if layer.momentum != 0.1] == ["fourth.norm"]
    assert [name for name, layer in layers.items() if not layer.weight.requires_grad] == ["third.norm"]
    assert [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None] == [
        "fourth.conv"
    ]
    moved = {layer.name: layer.moved for layer in recalibrate(model, batches).layers}
    assert moved["second.norm"] > 1
    assert moved["first.norm"] < 1e-3, "upstream of it, statistics are right"


def test_the_fault_is_what_makes_it_fail() -> None:
    model, batches, loss = example()

    def right() -> float:
        with torch.no_grad():
            return float(torch.cat([model(x).argmax(1) == y for x, y in batches]).double().mean())

    before = right()
    with torch.no_grad():
        losses = [float(loss(model(x), y)) for x, y in batches]
    recalibrate(model, batches)
    assert before < 0.5 < 0.85 < right()
    assert min(losses) > 1


def test_it_is_the_same_each_time_and_leaves_the_random_stream_and_the_threads() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = example().model.state_dict(), example().model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_digits_are_pictures_with_classes() -> None:
    x, y = digits(64, 3)
    assert (x.shape, y.shape, set(y.tolist()) <= set(range(10))) == ((64, 1, 12, 12), (64,), True)
    assert not torch.equal(x, digits(64, 4)[0])
