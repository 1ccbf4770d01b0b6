"""The context that says which domain samples are of: what it takes, and what it leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.choosing import check_one_population, choose, layers_with_domains, preserved, settle
from batchnorm.errors import OptionError
from support import tolerances
from support.comparison import close

NAMES = ("a", "b")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4, domains=NAMES), nn.ReLU(), bn.BatchNorm1d(4, domains=NAMES))
    with bn.domain(net, [0, 0, 0, 1, 1, 1]):
        net(torch.cat([torch.randn(3, 3), torch.randn(3, 3) * 3 + 2]))
    return net.eval()


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def by(net: nn.Module, which: Any) -> Tensor:
    with bn.domain(net, which), torch.no_grad():
        y: Tensor = net(X)
    return y


@pytest.mark.parametrize("which", ["b", 1, np.int64(1), torch.tensor(1), {"b": 2.0}, {"a": 0, "b": 1}], ids=str)
def test_one_domain_for_all(which: Any) -> None:
    net = network()
    close(by(net, which), by(net, [1, 1, 1, 1]), tolerances.OUTPUT)
    assert not torch.allclose(by(net, which), by(net, "a"))


@pytest.mark.parametrize(
    "which",
    [
        ["b", "a", "a", "b"],
        ("b", 0, "a", 1),
        torch.tensor([1, 0, 0, 1]),
        torch.tensor([1, 0, 0, 1], dtype=torch.uint8),
        torch.tensor([1, 9, 0, 9, 0, 9, 1, 9])[::2],
        np.array([1, 0, 0, 1]),
    ],
    ids=str,
)
def test_one_for_each_sample(which: Any) -> None:
    net = network()
    y, first, second = by(net, which), by(net, "a"), by(net, "b")
    assert torch.equal(y, torch.stack([second[0], first[1], first[2], second[3]]))


def test_contexts_in_contexts_and_after_exceptions() -> None:
    net = network()
    with bn.domain(net, "a"):
        outside = net(X)
        with bn.domain(net, "b"):
            assert not torch.equal(net(X), outside)
        assert torch.equal(net(X), outside)
        with pytest.raises(KeyError), bn.domain(net, "b"):
            raise KeyError
        assert torch.equal(net(X), outside)
        with pytest.raises(OptionError), bn.domain(net, "c"):
            pass
        assert torch.equal(net(X), outside)
    with pytest.raises(OptionError, match="without a choice"):
        net(X)


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("c", "got domain 'c'; this layer has 'a', 'b'"),
        (2, "got domain 2"),
        (-1, "got domain -1"),
        (0.5, "of type float for a domain"),
        (True, "of type bool for a domain"),
        ([True, False, True, True], "of type bool for a domain"),
        ([0, 1, 2, 0], "got domain 2"),
        (["a", "c", "a", "a"], "got domain 'c'"),
        (torch.tensor([0, 1, 2, 0]), "got domains from 0 to 2; this layer has 2"),
        (torch.tensor([0, -1, 1, 0]), "got domains from -1 to 1"),
        (torch.tensor([0.0, 1.0, 0.0, 0.0]), "dtype torch.float32"),
        (torch.tensor([True, False, True, True]), "dtype torch.bool"),
        (torch.zeros(4, 1, dtype=torch.int64), r"shape \(4, 1\)"),
        ({"a": -1.0, "b": 2.0}, "must be finite and >= 0"),
        ({"a": float("nan")}, "must be finite and >= 0"),
        ({"a": float("inf")}, "must be finite and >= 0"),
        ({}, "one must be > 0"),
        ({"c": 1.0}, "got domain 'c'"),
    ],
    ids=str,
)
def test_what_is_no_choice(which: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words), bn.domain(network(), which):
        pass


def test_a_model_without_domains_has_nothing_to_choose() -> None:
    for model in (nn.Linear(3, 3), nn.BatchNorm1d(3), bn.BatchNorm1d(3)):
        with pytest.raises(OptionError, match="nothing to choose"), bn.domain(model, "a"):
            pass


def test_layers_may_number_their_domains_in_their_own_way() -> None:
    net = nn.Sequential(bn.BatchNorm1d(3, domains=("a", "b")), bn.BatchNorm1d(3, domains=("b", "c", "a")))
    with bn.domain(net, ["a", "b", "b", "a"]):
        net(X)
    first, second = layers_with_domains(net)
    assert [first.statistics_of(name).num_batches_tracked.item() for name in ("a", "b")] == [1, 1]
    assert [second.statistics_of(name).num_batches_tracked.item() for name in ("b", "c", "a")] == [1, 0, 1]
    with pytest.raises(OptionError, match="got domain 'c'"), bn.domain(net, "c"):
        pass


def test_a_choice_without_a_context_lasts_to_the_end_of_what_preserves_it() -> None:
    net = network()
    layers = layers_with_domains(net)
    with preserved(layers):
        choose(layers, "b")
        y = net(X)
    assert torch.equal(y, by(net, "b"))
    with pytest.raises(OptionError):
        net(X)


@pytest.mark.parametrize("which", ["b", 0, {"a": 1.0, "b": 3.0}])
def test_a_choice_for_good(which: Any) -> None:
    net = network()
    settled = copy.deepcopy(net)
    settle(settled, which)
    close(settled(X).detach(), by(net, which), tolerances.OUTPUT)
    assert not layers_with_domains(settled)
    assert (
        settled.state_dict().keys()
        == nn.Sequential(*(m if i % 2 == 0 else nn.BatchNorm1d(4) for i, m in enumerate(net))).state_dict().keys()
    )


def test_a_choice_for_good_that_cannot_be_changes_nothing() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for which, words in ((None, "got no domain"), ("c", "got domain 'c'"), ([0, 1], "Give one name")):
        with pytest.raises(OptionError, match=words):
            settle(net, which)  # type: ignore[arg-type]  # what is refused
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(OptionError, match="without a layer that has domains"):
        settle(nn.BatchNorm1d(3), "a")


def test_who_looks_at_one_population_refuses_several() -> None:
    for look in (bn.check, bn.Monitor, lambda model: check_one_population(model, "this")):
        with pytest.raises(OptionError, match="looks at one population"):
            look(network())
    check_one_population(bn.BatchNorm1d(3, domains=("a",)), "this")
    assert bn.check(bn.revert(network(), domain="a")).layers
