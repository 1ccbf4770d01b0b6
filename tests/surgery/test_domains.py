"""Models get domains, and lose them again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import OptionError

NAMES = ("clean", "adversarial")
DOMAIN = torch.tensor([0, 1, 1, 0, 1, 0])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))


def images() -> Tensor:
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0)) + DOMAIN.view(-1, 1, 1, 1) * 3


def step(net: nn.Module) -> None:
    with bn.domain(net, DOMAIN):
        net(images())


@pytest.mark.parametrize("own_affine", [False, True])
def test_convert_keeps_the_objects_and_begins_every_domain_with_them(own_affine: bool) -> None:
    net = network()
    net(images())  # some statistics
    before = dict(net.named_parameters()) | dict(net.named_buffers())
    assert bn.convert(net, domains=NAMES, own_affine=own_affine) is net
    after = dict(net.named_parameters()) | dict(net.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())
    added = after.keys() - before.keys()
    assert len(added) == 2 * (5 if own_affine else 3)
    for name in added:
        assert torch.equal(after[name], before[name.removesuffix("_adversarial")])
    step(net)


def test_ours_get_domains_too_and_others_stay() -> None:
    net = nn.Sequential(bn.BatchNorm1d(3, activation="relu"), bn.BatchNorm1d(3, domains=NAMES))
    bn.convert(net, domains=NAMES)
    assert [layer.domains for layer in net] == [NAMES, NAMES]
    assert net[0].activation == "relu"
    with bn.domain(net, [0, 1, 1, 0]):
        net(torch.randn(4, 3))
    assert net[0].statistics_of("adversarial").num_batches_skipped.tolist() == [0, 0, 0]
    with pytest.warns(UserWarning, match=r"1 \(BatchNorm1d, which has domains="):
        bn.convert(nn.Sequential(nn.Identity(), bn.BatchNorm1d(3, domains=("other",))), domains=NAMES)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), "without running statistics"),
        (bn.BatchNorm1d(3, track_running_stats=False), "without running statistics"),
        (bn.LazyBatchNorm1d(), "no sizes yet"),
    ],
)
def test_what_cannot_have_domains_is_left_and_named(layer: nn.Module, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        bn.convert(nn.Sequential(layer), domains=NAMES)
    assert not getattr(layer, "domains", ())


def test_domains_that_are_no_names_change_nothing() -> None:
    net = network()
    with pytest.raises(OptionError, match="each name must be there once"):
        bn.convert(net, domains=("a", "a"))
    assert type(net[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("own_affine", [False, True])
@pytest.mark.parametrize("keep", [0, "adversarial", {"clean": 3, "adversarial": 1}], ids=str)
def test_revert_keeps_one_domain(keep: Any, own_affine: bool) -> None:
    if isinstance(keep, dict) and own_affine:
        pytest.skip("a mixture has no weight and bias")
    net = bn.convert(network(), domains=NAMES, own_affine=own_affine)
    step(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.rand_like(parameter) / 10)
    kept = copy.deepcopy(net)
    parameters = dict(kept.named_parameters())
    bn.revert(kept, domain=keep)
    assert type(kept[1]) is nn.BatchNorm2d
    assert kept.state_dict().keys() == network().state_dict().keys()
    if keep == "adversarial" and own_affine:
        assert kept[1].weight is parameters["1.weight_adversarial"]  # an optimizer has it
    with bn.domain(net.eval(), keep):
        expected = net(images())
    torch.testing.assert_close(kept.eval()(images()), expected)


def test_revert_without_a_domain_leaves_them_and_says_so() -> None:
    net = bn.convert(network(), domains=NAMES)
    with pytest.warns(UserWarning, match="pass domain= to keep one"):
        bn.revert(net)
    assert net[1].domains == NAMES
    with pytest.raises(OptionError, match="got domain 'c'"):
        bn.revert(net, domain="c")
    one = bn.convert(network(), domains=("only",))
    bn.revert(one)
    assert type(one[1]) is nn.BatchNorm2d


def test_sync_layers_get_domains() -> None:
    net = bn.convert(nn.Sequential(nn.SyncBatchNorm(3)), domains=NAMES)
    assert net[0].sync
    assert net[0].domains == NAMES
    with bn.domain(net, [0, 1, 1, 0]):
        net(torch.randn(4, 3))
    bn.revert(net, domain="clean")
    assert type(net[0]) is nn.SyncBatchNorm
