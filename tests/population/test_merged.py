"""Statistics of many, pooled: what all the data in one place give."""

from __future__ import annotations

import copy
import doctest
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import CountError, NonFiniteError, OptionError
from batchnorm.population import merged
from support import oracle, tolerances
from support.comparison import close
from support.populations import images, layers, made


def of_data(x: Tensor) -> nn.BatchNorm1d:
    """A layer whose statistics are those of x."""
    n, mean, m2 = oracle.moments(x.double().numpy())
    layer = nn.BatchNorm1d(x.shape[1], dtype=torch.float64)
    layer.running_mean.copy_(torch.from_numpy(mean))
    layer.running_var.copy_(torch.from_numpy(m2 / n))
    return layer


@st.composite
def parts(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(2, 20)), 3, generator=generator).double() * 3 + 50
    cuts = sorted(draw(st.sets(st.integers(1, len(x) - 1), max_size=5)))
    pieces = [x[a:b] + i for i, (a, b) in enumerate(itertools.pairwise([0, *cuts, len(x)]))]
    return torch.cat(pieces), draw(st.permutations(pieces))


@given(parts(), st.sampled_from([1, 0.25, 1000]))
def test_all_data_in_one_place(drawn: tuple[Tensor, list[Tensor]], unit: float) -> None:
    x, pieces = drawn
    pooled = bn.pool_statistics([of_data(piece) for piece in pieces], [unit * len(piece) for piece in pieces])
    n, mean, m2 = oracle.moments(x.numpy())
    close(pooled.state_dict["running_mean"], mean, relative=tolerances.STATISTIC)
    close(pooled.state_dict["running_var"], m2 / n, tolerances.STATISTIC)


def test_parts_of_the_data_of_one_network() -> None:
    """By method "pooled", where a layer's statistics are of the same inputs whoever pools them."""
    batches = images(8, 3, 5, 6)
    whole = made("residual")
    bn.recalibrate(whole, batches, method="pooled")
    members = [made("residual") for _ in range(2)]
    for member, mine in zip(members, (batches[:1], batches[1:]), strict=True):
        bn.recalibrate(member, mine, method="pooled")
    pooled = bn.pool_statistics(members, [8, 14])
    assert pooled.pooled == ("bn1", "bn2", "bn3", "bn4")
    for name, layer in layers(whole).items():
        close(pooled.state_dict[f"{name}.running_mean"], layer.running_mean, tolerances.STATISTIC)
        close(pooled.state_dict[f"{name}.running_var"], layer.running_var, tolerances.STATISTIC)


def test_the_rest_is_the_firsts_and_the_counter_the_largest() -> None:
    first, second = made("fused", 0), made("fused", 1)
    layers(second)["bn1"].num_batches_tracked.fill_(30)
    before = copy.deepcopy([first.state_dict(), second.state_dict()])
    pooled = bn.pool_statistics([first, second.state_dict()], [1, 3])
    state = pooled.state_dict
    assert list(state) == list(before[0])
    statistics = {name for name in state if name.rpartition(".")[2] in ("running_mean", "running_var")}
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert set(pooled.copied) == state.keys() - statistics - counters
    assert all(state[name] is not None and torch.equal(state[name], before[0][name]) for name in pooled.copied)
    assert [state[name].item() for name in sorted(counters)] == [30, 7, 7]
    assert {state[name].dtype for name in counters} == {torch.int64}
    for model, old in zip((first, second), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    assert state._metadata == first.state_dict()._metadata
    loaded = made("fused", 2)
    loaded.load_state_dict(state)
    assert torch.equal(loaded.bn1.running_mean, state["bn1.running_mean"])


def test_a_count_of_0_weighs_nothing() -> None:
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    other.running_mean.fill_(float("nan"))
    pooled = bn.pool_statistics([other, one], [0, 5])
    assert pooled.state_dict["running_mean"].tolist() == [0, 0]
    assert pooled.state_dict["running_var"].tolist() == [1, 1]


def test_one_source_is_itself() -> None:
    model = made("plain")
    for name, value in bn.pool_statistics([model], [3]).state_dict.items():
        close(value, model.state_dict()[name], tolerances.STATISTIC, name=name)


def test_wrapped_models() -> None:
    model = made("plain")
    pooled = bn.pool_statistics([nn.DataParallel(model), model], [1, 1])
    assert list(pooled.state_dict) == list(model.state_dict())
    assert pooled.unpooled == ()


def test_what_does_not_match_is_named_and_left() -> None:
    def net(*norms: nn.Module) -> nn.Module:
        return nn.Sequential(*norms)

    first = net(nn.BatchNorm1d(2), nn.BatchNorm1d(3), nn.BatchNorm1d(2), nn.Linear(2, 2))
    second = net(nn.BatchNorm1d(2), nn.BatchNorm1d(4), nn.Identity(), nn.Linear(2, 2), nn.BatchNorm1d(5))
    for layer in layers(second).values():
        layer.running_mean.fill_(1.0)
    odd = second.state_dict()
    pooled = bn.pool_statistics([first, odd], [1, 1])
    assert pooled.pooled == ("0",)
    assert pooled.unpooled == (
        ("1", "shape (3,) in source 0 and (4,) in source 1"),
        ("2", "source 1 does not have it"),
        ("4", "source 0 does not have it"),
    )
    assert "1.running_mean" in pooled.copied
    assert str(pooled).splitlines()[0] == "statistics pooled: 0"
    assert str(pooled).splitlines()[-1] == "not pooled: 4 (source 0 does not have it)"
    first.load_state_dict(pooled.state_dict)
    assert first[0].running_mean.tolist() == [0.5, 0.5]
    assert first[0].running_var.tolist() == [1.25, 1.25]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(2, dtype=torch.int64), "source 1 has no floating values there, but torch.int64"),
        ("text", "source 1 has no floating values there, but str"),
        (torch.zeros(3), r"source 1 has means of shape \(3,\) and variances of \(2,\)"),
        (torch.zeros(2, device="meta"), "source 1 has no floating values there"),
    ],
)
def test_what_is_no_statistics(value: Any, reason: str) -> None:
    state = dict(nn.BatchNorm1d(2).state_dict()) | {"running_mean": value}
    with pytest.raises(OptionError, match=f"got 2 sources without a batch-norm layer .*the model itself: {reason}"):
        bn.pool_statistics([nn.BatchNorm1d(2), state], [1, 1])


@pytest.mark.parametrize(
    ("sources", "counts", "error", "message"),
    [
        ([], [], OptionError, "got 0 sources and 0 counts"),
        ([nn.BatchNorm1d(2)], [1, 2], OptionError, "got 1 sources and 2 counts"),
        ([nn.BatchNorm1d(2)], [-1], OptionError, "got a count of -1"),
        ([nn.BatchNorm1d(2)], [float("nan")], OptionError, "got a count of nan"),
        ([nn.BatchNorm1d(2)] * 2, [0, 0], CountError, "all 0"),
        ([nn.Linear(2, 2)] * 2, [1, 1], OptionError, "there is none"),
    ],
)
def test_errors(sources: Any, counts: list[float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bn.pool_statistics(sources, counts)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("running_mean", np.inf, NonFiniteError),
        ("running_var", np.nan, NonFiniteError),
        ("running_var", -1, OptionError),
    ],
)
def test_values_that_cannot_be(name: str, value: float, error: type[Exception]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0]._buffers[name][1] = value
    with pytest.raises(error, match='layer "0" of source 1: got'):
        bn.pool_statistics([nn.Sequential(nn.BatchNorm1d(2)), model], [1, 1])


def test_a_dtype_that_cannot_hold_the_variance_between() -> None:
    one, other = nn.BatchNorm1d(2).half(), nn.BatchNorm1d(2).half()
    other.running_mean.fill_(60000)
    with pytest.raises(NonFiniteError, match=r"torch.float16 cannot hold"):
        bn.pool_statistics([one, other], [1, 1])


def test_the_docstring() -> None:
    results = doctest.testmod(merged)
    assert results.attempted >= 4
    assert results.failed == 0


# --- domains ---------------------------------------------------------------------------------------------------------


def of_domains(means: tuple[float, float], tracked: tuple[int, int]) -> nn.Module:
    layer: Any = bn.BatchNorm1d(2, domains=("clean", "noisy"), own_affine=True)
    for name, mean, count in zip(layer.domains, means, tracked, strict=True):
        layer.statistics_of(name).mean.fill_(mean)
        layer.statistics_of(name).num_batches_tracked.fill_(count)
    return nn.Sequential(layer)


def test_each_domain_is_pooled_by_itself() -> None:
    sources = [of_domains((0, 10), (1, 9)), of_domains((4, 30), (5, 2)).state_dict()]
    counts = [{"clean": 1, "noisy": 3}, {"noisy": 1, "clean": 1}]
    for pooled, noisy in (
        (bn.pool_statistics(sources, counts), (15, 76)),
        (bn.pool_statistics(sources, [2, 2]), (20, 101)),
    ):
        state = pooled.state_dict
        assert pooled.pooled == ("0", "0 (noisy)")
        assert state["0.running_mean"].tolist() == [2, 2]
        assert state["0.running_var"].tolist() == [5, 5]
        assert state["0.running_mean_noisy"].tolist() == [noisy[0]] * 2
        assert state["0.running_var_noisy"].tolist() == [noisy[1]] * 2
        assert (state["0.num_batches_tracked"], state["0.num_batches_tracked_noisy"]) == (5, 9)
        assert pooled.copied == ("0.weight", "0.bias", "0.weight_noisy", "0.bias_noisy")
        of_domains((1, 1), (0, 0)).load_state_dict(state)


def test_a_domain_that_nobody_saw_is_the_firsts() -> None:
    sources = [of_domains((0, 10), (1, 9)), of_domains((4, 30), (5, 2))]
    pooled = bn.pool_statistics(sources, [{"clean": 1, "noisy": 0}] * 2)
    assert pooled.unpooled == (("0 (noisy)", "all counts are 0"),)
    assert pooled.state_dict["0.running_mean_noisy"].tolist() == [10, 10]


@pytest.mark.parametrize("count", [{}, {"clean": 1}, {"noisy": 1}, {"clean": 1, "noisy": 1, "odd": 1}])
def test_a_count_for_each_domain(count: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="there must be one for"):
        bn.pool_statistics([of_domains((0, 10), (1, 9))] * 2, [{"clean": 1, "noisy": 1}, count])
