"""Stored moments and those of batches, where every layer sees what the layers before it make of both."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import CountError, NonFiniteError, OrderError
from support import oracle, tolerances
from support.comparison import close
from support.populations import NETS, everything, images, inputs, layers, made

pytestmark = pytest.mark.filterwarnings("ignore:layer .* is adapted by")  # by few samples

SIZES = (5, 3, 2)
SAMPLES = sum(SIZES)


def stored(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {
        name: (layer.running_mean.double().numpy().copy(), layer.running_var.double().numpy().copy())
        for name, layer in layers(model).items()
    }


def assert_joined(model: nn.Module, before: dict[str, tuple[Any, Any]], batches: list[Tensor], prior: float) -> None:
    """Each layer's statistics are the oracle's: of `prior` samples of before, and of what comes in now."""
    n = sum(len(batch) for batch in batches)
    share = prior / (prior + n)
    for name, rows in inputs(model, batches).items():
        layer = layers(model)[name]
        count, mean, m2 = oracle.moments(rows)
        old_mean, old_var = before[name]
        expected_mean = share * old_mean + (1 - share) * mean
        expected = share * old_var + (1 - share) * m2 / count + share * (1 - share) * (old_mean - mean) ** 2
        std = np.sqrt(expected + vars(layer)["eps"])
        assert (abs(layer.running_mean.double().numpy() - expected_mean) / std).max() <= tolerances.POPULATION
        close(layer.running_var, expected, relative=tolerances.POPULATION)


@pytest.mark.parametrize("prior", [0, 4, 100.5])
@pytest.mark.parametrize("net", NETS)
def test_the_moments_of_both_populations(net: str, prior: float) -> None:
    model, batches = made(net), images(*SIZES)
    before, whole = stored(model), everything(model)
    with bn.adapt(model, batches, prior=prior) as adapted:
        assert not any(module.training for module in model.modules())
        assert_joined(model, before, batches, prior)
        for layer in adapted.report.layers:
            assert layer.samples == SAMPLES
            assert layer.weight == SAMPLES / (SAMPLES + prior)
        state = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(batches[0])  # nothing moves any more
        assert all(torch.equal(buffer, state[name]) for name, buffer in model.named_buffers())
    assert everything(model) == whole


def test_prior_0_is_recalibration() -> None:
    one, other = made("residual"), made("residual")
    bn.recalibrate(one, images(*SIZES))
    with bn.adapt(other, images(*SIZES), prior=0):
        for (name, expected), (_, buffer) in zip(one.named_buffers(), other.named_buffers(), strict=True):
            assert torch.equal(expected, buffer), name


@settings(max_examples=20)
@given(st.data())
def test_no_split_and_no_order_matters(data: st.DataObject) -> None:
    x = torch.cat(images(*SIZES))
    cuts = sorted(data.draw(st.lists(st.integers(1, SAMPLES - 1), max_size=4)))
    parts = data.draw(st.permutations([x[a:b] for a, b in itertools.pairwise([0, *cuts, SAMPLES])]))
    one, other = made("residual"), made("residual")
    with bn.adapt(one, [x], prior=8), bn.adapt(other, parts, prior=8):
        for (name, expected), (_, buffer) in zip(one.named_buffers(), other.named_buffers(), strict=True):
            close(buffer, expected, tolerances.PARTS, relative=tolerances.PARTS, name=name)


def test_passes_that_are_repeated_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no memory is allowed, suspended passes begin again."""
    from batchnorm.population import memory

    one, other = made("residual"), made("residual")
    with bn.adapt(one, images(*SIZES)) as expected:
        monkeypatch.setattr(memory, "default_limit", lambda device: 0)
        monkeypatch.setattr("batchnorm.population.spill.available", lambda: False)
        with bn.adapt(other, images(*SIZES)) as adapted:
            assert adapted.report == expected.report
            for (name, before), (_, buffer) in zip(one.named_buffers(), other.named_buffers(), strict=True):
                assert torch.equal(before, buffer), name


def test_a_layer_that_sees_nothing_keeps_what_it_has() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x[:0])
            return self.used(x)

    model = Half()
    with bn.adapt(model, [torch.randn(40, 2) + 3]) as adapted:
        assert model.used.running_mean.min() > 1
        assert model.unused.running_mean.tolist() == [0, 0]
        assert adapted.report.skipped == (("unused", "no values yet"),)


@pytest.mark.parametrize(
    ("batches", "prior", "error"),
    [
        ([], 16, CountError),
        ([torch.zeros(0, 2)], 16, CountError),
        ([torch.randn(1, 2)], 0, CountError),
        ([torch.randn(3, 2), torch.full((3, 2), float("inf"))], 16, NonFiniteError),
    ],
)
def test_errors_leave_the_model_as_it_was(batches: list[Tensor], prior: float, error: type[Exception]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    before = everything(model)
    with pytest.raises(error), bn.adapt(model, batches, prior=prior):
        raise AssertionError("not reached")
    assert everything(model) == before


def test_a_layer_that_is_called_twice() -> None:
    layer = nn.BatchNorm1d(2)
    with pytest.raises(OrderError, match="called twice"), bn.adapt(nn.Sequential(layer, layer), [torch.randn(4, 2)]):
        raise AssertionError("not reached")
