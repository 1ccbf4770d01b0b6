"""What layers with domains keep, load and give away: torch's keys for the first domain, names beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm.errors import OptionError
from support import tolerances
from support.comparison import close

PLAIN = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def used(**options: Any) -> bn.BatchNorm1d:
    """With other values in each tensor."""
    layer = bn.BatchNorm1d(3, **{"domains": ("a", "b"), **options})
    with torch.no_grad():
        for number, tensor in enumerate([*layer.parameters(), *layer.buffers()]):
            tensor.fill_(number + 2)
    return layer


def test_the_first_domains_keys_are_torchs() -> None:
    assert list(used().state_dict()) == [*PLAIN, *(f"{name}_b" for name in PLAIN[2:])]
    assert sorted(used(own_affine=True).state_dict()) == sorted([*PLAIN, *(f"{name}_b" for name in PLAIN)])
    assert list(used(domains=("only",)).state_dict()) == PLAIN


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("own_affine", [False, True])
def test_a_plain_checkpoint_begins_every_domain(own_affine: bool, assign: bool) -> None:
    plain = nn.Sequential(used(domains=None))
    net = nn.Sequential(used(own_affine=own_affine))
    given = plain.state_dict()
    keys = list(given)
    net.load_state_dict(given, assign=assign)
    assert list(given) == keys
    for name, value in net.state_dict().items():
        assert torch.equal(value, given[name.removesuffix("_b")]), name
    with torch.no_grad():
        net[0].statistics_of("b").mean.fill_(-1)  # tensors of its own
    assert torch.equal(net[0].running_mean, given["0.running_mean"])


def test_a_domains_checkpoint_goes_both_ways() -> None:
    layer, other = used(own_affine=True), bn.BatchNorm1d(3, domains=("a", "b"), own_affine=True)
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True))
    plain = nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*running_mean_b"):
        plain.load_state_dict(layer.state_dict())
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(plain.running_mean, layer.running_mean)
    incomplete = {name: value for name, value in layer.state_dict().items() if name != "running_var_b"}
    with pytest.raises(RuntimeError, match=r"Missing key.*running_var_b"):
        other.load_state_dict(incomplete)


def test_statistics_by_name_or_number_are_the_layers_own() -> None:
    layer = used()
    for which, suffix in (("a", ""), (0, ""), ("b", "_b"), (1, "_b")):
        found = layer.statistics_of(which)
        for name, value in zip(PLAIN[2:], found, strict=False):
            assert value is layer.get_buffer(name + suffix)
    assert bn.BatchNorm1d(3).statistics_of().mean.tolist() == [0, 0, 0]
    for which in ("c", 2, -1, True, 0.0):
        with pytest.raises(OptionError, match="got domain"):
            layer.statistics_of(which)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(OptionError, match="without running statistics"):
        bn.BatchNorm1d(3, track_running_stats=False).statistics_of()


def test_every_domain_is_reset() -> None:
    layer = used(own_affine=True)
    fresh = bn.BatchNorm1d(3, domains=("a", "b"), own_affine=True).state_dict()
    layer.reset_running_stats()
    assert layer.statistics_of("b").mean.tolist() == [0, 0, 0]
    assert layer.weight_b.tolist() == [4, 4, 4]
    layer.reset_parameters()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())


def test_moves_and_averages_take_all_domains() -> None:
    layer = used(own_affine=True)
    there = copy.deepcopy(layer).to("meta")
    assert all(tensor.is_meta for tensor in [*there.parameters(), *there.buffers()])
    half = copy.deepcopy(layer).half()
    assert half.weight_b.dtype == torch.float16
    assert half.statistics_of("b").mean.dtype == torch.float32
    averaged = AveragedModel(nn.Sequential(layer), use_buffers=True)
    averaged.update_parameters(nn.Sequential(used(own_affine=True)))
    close(averaged.module[0].statistics_of("b").mean, layer.statistics_of("b").mean, tolerances.STATISTIC)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"domains": "clean"}, "must be a sequence of names"),
        ({"domains": ("a.b",)}, "without dots"),
        ({"domains": ("", "b")}, "must be a sequence of names"),
        ({"domains": (1, 2)}, "must be a sequence of names"),
        ({"domains": ("a", "a")}, "each name must be there once"),
        ({"domains": ("a", "b"), "track_running_stats": False}, "without running statistics"),
        ({"domains": ("a", "b"), "affine": False, "own_affine": True}, "without weight and bias"),
        ({"own_affine": True}, "own_affine=True without domains"),
    ],
    ids=str,
)
def test_domains_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        bn.BatchNorm1d(3, **options)


@pytest.mark.parametrize("cls", [bn.LazyBatchNorm1d, bn.LazyBatchNorm2d, bn.LazyBatchNorm3d])
def test_layers_without_sizes_say_why_not(cls: Any) -> None:
    with pytest.raises(OptionError, match="no sizes yet"):
        cls(domains=("a", "b"))
    layer = cls()
    layer(torch.zeros(2, 3, *[2] * (layer.ranks[-1] - 2)))
    bn.convert(layer, domains=("a", "b"))
    assert layer.domains == ("a", "b")


def test_who_rebuilds_it_is_told_of_the_domains() -> None:
    layer = used(own_affine=True)
    assert "domains=('a', 'b'), own_affine=True" in repr(layer)
    with pytest.raises(OptionError, match="domains="):
        _ = layer.num_features
    assert used(domains=None).options() == {}
