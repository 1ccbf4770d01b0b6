"""Population statistics of each domain: those of its own samples, whatever batches they come in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import CountError, OptionError
from batchnorm.population.recalibrate import METHODS
from support import tolerances
from support.comparison import close

NAMES = ("clean", "noisy")


def network() -> nn.Module:
    torch.manual_seed(0)
    return bn.convert(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3)),
        domains=NAMES,
    )


def images(number: int, seed: int) -> Tensor:
    return torch.randn(number, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) * (seed + 1) + seed


CLEAN, NOISY = [images(4, 0), images(3, 1)], [images(2, 5), images(6, 6), images(1, 7)]
MIXED_ORDER = [(NOISY[0], "noisy"), (CLEAN[0], 0), (NOISY[1], 1), (CLEAN[1], "clean"), (NOISY[2], "noisy")]


def statistics(net: nn.Module, domain: str) -> list[Tensor]:
    return [t for layer in (net[1], net[4]) for t in layer.statistics_of(domain)[:2]]


def alone(method: str, batches: list[Tensor]) -> list[Tensor]:
    """What a model without domains would get."""
    net = bn.revert(network(), domain=0)
    bn.recalibrate(net, batches, method=method)
    return [t for layer in (net[1], net[4]) for t in (layer.running_mean, layer.running_var)]


@pytest.mark.parametrize("method", METHODS)
def test_each_domain_has_its_own_population(method: str) -> None:
    net = network()
    before = [layer.num_batches_tracked.clone() for layer in (net[1], net[4])]
    result = bn.recalibrate(net, MIXED_ORDER, method=method, domain_of=lambda item: item[1])
    for name, batches in (("clean", CLEAN), ("noisy", NOISY)):
        for actual, expected in zip(statistics(net, name), alone(method, batches), strict=True):
            close(actual, expected, relative=tolerances.PARTS, absolute=tolerances.PARTS)
    assert [layer.name for layer in result.layers] == ["1 (clean)", "1 (noisy)", "4 (clean)", "4 (noisy)"]
    assert [layer.count for layer in result.layers] == [7 * 16, 9 * 16, 7 * 9, 9 * 9]
    assert (result.batches, result.samples) == (5, 16)
    assert [layer.num_batches_tracked for layer in (net[1], net[4])] == before
    with pytest.raises(OptionError, match="without a choice"):  # as it was
        net(CLEAN[0])


@pytest.mark.parametrize("kind", ["names", "tensor"])
@pytest.mark.parametrize("seed", range(3))
def test_one_for_each_sample_in_any_order(kind: str, seed: int) -> None:
    samples = torch.cat([*CLEAN, *NOISY])
    numbers = torch.tensor([0] * 7 + [1] * 9)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    batches: list[Any] = []
    for part in order.split([5, 7, 4] if seed else [16]):
        of_each = numbers[part] if kind == "tensor" else [NAMES[number] for number in numbers[part]]
        batches.append((samples[part], of_each))
    net = network()
    bn.recalibrate(net, batches, domain_of=lambda item: item[1])
    for name, own in (("clean", CLEAN), ("noisy", NOISY)):
        for actual, expected in zip(statistics(net, name), alone("exact", own), strict=True):
            close(actual, expected, relative=tolerances.PARTS * 2, absolute=tolerances.PARTS)


@pytest.mark.parametrize("method", METHODS)
def test_in_a_context_the_chosen_domain_is_recalibrated(method: str) -> None:
    net = network()
    before = [t.clone() for t in statistics(net, "clean")]
    with bn.domain(net, "noisy"):
        result = bn.recalibrate(net, NOISY, method=method)
        net.eval()(NOISY[0])  # the choice is still there
    for actual, expected in zip(statistics(net, "noisy"), alone(method, NOISY), strict=True):
        close(actual, expected, relative=tolerances.PARTS, absolute=tolerances.PARTS)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(net, "clean"), strict=True))
    assert [layer.name for layer in result.layers] == ["1 (noisy)", "4 (noisy)"]


def test_a_domain_without_samples_keeps_its_statistics() -> None:
    net = network()
    result = bn.recalibrate(net, CLEAN, domain_of=lambda _: "clean")
    assert [(layer.name, layer.reason) for layer in result.skipped] == [
        ("1 (noisy)", "never called with a value"),
        ("4 (noisy)", "never called with a value"),
    ]
    assert all(torch.equal(t, torch.full_like(t, t.view(-1)[0])) for t in statistics(net, "noisy"))


def test_layers_without_domains_see_all_samples() -> None:
    net = nn.Sequential(bn.BatchNorm2d(2, domains=NAMES), bn.BatchNorm2d(2))
    bn.recalibrate(net, MIXED_ORDER, domain_of=lambda item: item[1])
    with torch.no_grad():
        y = torch.cat([_by(net[0], name, x) for name, xs in (("clean", CLEAN), ("noisy", NOISY)) for x in xs])
    close(net[1].running_mean, y.double().mean((0, 2, 3)).float(), tolerances.STATISTIC)
    close(net[1].running_var, y.double().var((0, 2, 3), correction=0).float(), tolerances.STATISTIC)


def _by(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    with bn.domain(layer.eval(), name):
        y: Tensor = layer(x)
    return y


def test_what_cannot_be_known_is_refused_and_nothing_changes() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(OptionError, match="or pass domain_of="):
        bn.recalibrate(net, CLEAN)
    with bn.domain(net, [0, 1, 0, 1]), pytest.raises(OptionError, match="or pass domain_of="):
        bn.recalibrate(net, CLEAN)
    with pytest.raises(OptionError, match="got domain 'other'"):
        bn.recalibrate(net, CLEAN, domain_of=lambda _: "other")
    with pytest.raises(OptionError, match="one for each sample"):
        bn.recalibrate(net, CLEAN, domain_of=lambda _: [0, 1])
    with pytest.raises(OptionError, match="one for each sample"):
        bn.recalibrate(net, CLEAN, domain_of=lambda _: None)  # type: ignore[arg-type,return-value]  # what is refused
    with pytest.raises(CountError, match="without a sample"):
        bn.recalibrate(net, [], domain_of=lambda _: "clean")
    with pytest.raises(OptionError, match="without a layer that has domains"):
        bn.recalibrate(bn.BatchNorm2d(2), CLEAN, domain_of=lambda _: "clean")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_leaves_everything_as_it_was(method: str) -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())

    def failing(item: Any) -> str:
        if item[1] == 1:
            raise KeyboardInterrupt
        return "clean"

    with pytest.raises(KeyboardInterrupt):
        bn.recalibrate(net, MIXED_ORDER, method=method, domain_of=failing)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(OptionError, match="without a choice"):
        net(CLEAN[0])


def test_a_limit_counts_samples_before_they_are_parted() -> None:
    net = network()
    result = bn.recalibrate(
        net,
        [(torch.cat([*CLEAN, *NOISY]), [0] * 7 + [1] * 9)],
        domain_of=lambda item: item[1][: len(item[0])],
        max_samples=10,
    )
    assert result.samples == 10
    assert [layer.count for layer in result.layers] == [7 * 16, 3 * 16, 7 * 9, 3 * 9]
