"""How far data are from what is stored: by the formula, and in order."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import CountError, NonFiniteError
from batchnorm.population import distance as module
from batchnorm.population.distance import DomainDistance, LayerDistance
from batchnorm.population.result import SkippedLayer
from support import oracle, tolerances
from support.comparison import close
from support.oracle import Array
from support.populations import NETS, everything, images, inputs, layers, made


def expected(layer: Any, rows: Array) -> Array:
    """Each channel's distance in stored standard deviations, by the oracle."""
    n, mean, m2 = oracle.moments(rows)
    stored_mean, stored_var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    squared = (mean - stored_mean) ** 2 + (np.sqrt(m2 / n) - np.sqrt(stored_var)) ** 2
    return np.sqrt(squared / (stored_var + vars(layer)["eps"]))


@pytest.mark.parametrize("net", NETS)
def test_the_formula(net: str) -> None:
    model, batches = made(net), images(4, 3, 5)
    before = everything(model)
    found = bn.domain_distance(model, batches)
    assert everything(model) == before
    assert found.domains == ("stored statistics",)
    assert (found.nearest, found.samples, found.skipped) == ("stored statistics", 12, ())
    rows = inputs(model, batches)
    assert [layer.name for layer in found.layers] == list(layers(model))
    of_layers = []
    for layer in found.layers:
        channels = expected(layers(model)[layer.name], rows[layer.name])
        close(layer.channels["stored statistics"], channels, tolerances.STATISTIC)
        assert layer.count == len(rows[layer.name])
        assert layer.by_chance == np.sqrt(1.5 / len(rows[layer.name]))
        of_layers.append(np.sqrt((channels**2).mean()))
        close(layer.distances["stored statistics"], of_layers[-1], tolerances.STATISTIC)
    close(found.distances["stored statistics"], np.sqrt(np.mean(np.square(of_layers))), tolerances.STATISTIC)


def test_no_split_matters() -> None:
    one = bn.domain_distance(made("residual"), images(4, 3, 5))
    other = bn.domain_distance(made("residual"), reversed(torch.cat(images(4, 3, 5)).split(5)))
    close(one.distances["stored statistics"], other.distances["stored statistics"], tolerances.PARTS)


def test_of_its_own_data_a_model_is_at_0_and_further_with_every_shift() -> None:
    model, batches = made("residual"), images(4, 3, 5)
    bn.recalibrate(model, batches)
    found = [bn.domain_distance(model, [batch + shift for batch in batches]) for shift in (0, 0.5, 2)]
    distances = [one.distances["stored statistics"] for one in found]
    assert distances[0] < tolerances.POPULATION
    assert sorted(distances) == distances


def test_what_is_by_chance() -> None:
    layer = nn.BatchNorm1d(200)
    found = bn.domain_distance(layer, [torch.randn(500, 200)]).layers[0]
    assert found.distances["stored statistics"] == pytest.approx(found.by_chance, rel=0.15)


# --- domains ---------------------------------------------------------------------------------------------------------


def net_of_domains(own_affine: bool = False) -> tuple[nn.Module, dict[str, list[Tensor]]]:
    """Two layers with domains and one without, which know their data."""
    torch.manual_seed(0)
    names = ("dark", "bright", "odd")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        bn.BatchNorm2d(4, domains=names, own_affine=own_affine),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        bn.BatchNorm2d(4, domains=names, own_affine=own_affine),
    )
    generator = torch.Generator().manual_seed(1)
    data = {
        name: [torch.randn(6, 3, 8, 8, generator=generator) * spread + mean for _ in range(2)]
        for name, mean, spread in (("dark", 0, 1), ("bright", 3, 1), ("odd", 0, 4))
    }
    for name, batches in data.items():
        with bn.domain(model, name), bn.adapt(model, batches, prior=0) as adapted:
            adapted.keep()
    return model, data


@pytest.mark.parametrize("own_affine", [False, True])
@pytest.mark.filterwarnings("ignore:layer .* is adapted by")
def test_the_domain_that_data_are_of_is_the_nearest(own_affine: bool) -> None:
    model, data = net_of_domains(own_affine)
    before = everything(model)
    for name, batches in data.items():
        found = bn.domain_distance(model, iter([batch + 0.01 for batch in batches]))
        assert found.domains == ("dark", "bright", "odd")
        assert found.nearest == name
        assert found.distances[name] < 0.5 * min(found.distances[other] for other in data if other != name)
        assert str(found).splitlines()[:2] == [
            f"12 samples: nearest {name}",
            f"{name}: {found.distances[name]:.3g}",
        ]
    assert everything(model) == before


@pytest.mark.filterwarnings("ignore:layer .* is adapted by")
def test_of_each_domain_by_the_formula() -> None:
    """In units of one standard deviation for all: of the mean of the stored variances."""
    model, data = net_of_domains()
    found = bn.domain_distance(model, data["dark"])
    layer: Any = model[1]
    unit = torch.stack([layer.statistics_of(name).var for name in data]).double().mean(0).numpy() + vars(layer)["eps"]
    n, mean, m2 = oracle.moments(torch.cat([model[0](x) for x in data["dark"]]).detach().double().numpy())
    for name in data:
        stored_mean, stored_var, *_ = layer.statistics_of(name)
        squared = (mean - stored_mean.double().numpy()) ** 2
        squared += (np.sqrt(m2 / n) - stored_var.double().sqrt().numpy()) ** 2
        close(found.layers[0].channels[name], np.sqrt(squared / unit), tolerances.POPULATION)


# --- edges -----------------------------------------------------------------------------------------------------------


def test_frozen_layers_count_and_others_are_skipped() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = bn.freeze(bn.BatchNorm1d(2)), nn.BatchNorm1d(2)
            self.without = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.used(self.without(x)))

    found = bn.domain_distance(Some(), [torch.randn(5, 2)])
    assert [(layer.name, layer.count) for layer in found.layers] == [("used", 10)]
    assert found.skipped == (("without", "no running statistics"), ("unused", "never called with a value"))


def failing() -> Iterator[Tensor]:
    yield torch.randn(3, 2)
    raise LookupError


@pytest.mark.parametrize(
    ("batches", "error"),
    [([], CountError), ([torch.full((3, 2), float("nan"))], NonFiniteError), (failing(), LookupError)],
)
def test_errors_leave_the_model_as_it_was(batches: Any, error: type[Exception]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    before = everything(model)
    with pytest.raises(error):
        bn.domain_distance(model, batches)
    assert everything(model) == before


def test_it_prints_a_column_for_each_domain() -> None:
    rows = tuple(
        LayerDistance(f"layer{i}", 100, {"a": torch.tensor([3.0, 4.0]), "a longer name": torch.tensor([1.0, 1.0])})
        for i in range(12)
    )
    found = DomainDistance(("a", "a longer name"), None, rows, (SkippedLayer("head", "no running statistics"),))
    lines = str(found).splitlines()
    assert lines[:5] == [
        "data: nearest a longer name",
        "a longer name: 1",
        "a: 3.54",
        "layer           a  a longer name",
        "layer0       3.54              1",
    ]
    assert lines[-2:] == ["and 2 more layers", "skipped: head (no running statistics)"]


def test_without_layers_there_is_nothing_to_measure() -> None:
    found = bn.domain_distance(nn.Linear(2, 2), [torch.randn(3, 2)])
    assert (found.layers, found.nearest, found.distances) == ((), "stored statistics", {"stored statistics": 0.0})


def test_the_docstring() -> None:
    results = doctest.testmod(module)
    assert results.attempted >= 3
    assert results.failed == 0
