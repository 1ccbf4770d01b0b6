"""What is heard of layers, and how often their inputs are read."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.listening import Heard, Listening
from batchnorm.models.norm_layers import named_norm_layers
from diagnosis.training import hooks
from support import oracle, tolerances
from support.comparison import close


def heard(model: nn.Module, *args: Any, **kwargs: Any) -> list[Heard]:
    listening = Listening(named_norm_layers(model))
    model(*args, **kwargs)
    found = listening.heard()
    listening.end()
    assert not hooks(model)
    return found


def agrees(one: Heard, x: Tensor, **options: Any) -> None:
    count, mean, m2 = oracle.moments(x.double().numpy(), **options)
    assert one.moments is not None
    close(one.moments.count, count)
    close(one.moments.mean, mean, tolerances.STATISTIC)
    close(one.moments.m2, m2, tolerances.STATISTIC)


OURS = {
    "plain": lambda: bn.BatchNorm2d(3),
    "activation": lambda: bn.BatchNorm2d(3, activation="relu"),
    "ghost": lambda: bn.BatchNorm2d(3, virtual_batch_size=2),
    "renorm": lambda: bn.BatchNorm2d(3, renorm=bn.Renorm()),
    "average": lambda: bn.BatchNorm2d(3, momentum=None),
}
OTHERS = {
    "torch": lambda: nn.BatchNorm2d(3),
    "frozen": lambda: bn.freeze(nn.Sequential(bn.BatchNorm2d(3)))[0],
    "inference": lambda: bn.BatchNorm2d(3).eval(),
    "untracked": lambda: bn.BatchNorm2d(3, track_running_stats=False),
}


@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_moments_are_heard_and_read_again_where_nothing_is_proposed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Tensor] = []
    of = bn.Moments.of
    monkeypatch.setattr(bn.Moments, "of", lambda x, **options: reads.append(x) or of(x, **options))
    x = torch.randn(5, 3, 4, 4) * 2 + 1
    (one,) = heard((OURS | OTHERS)[name](), x)
    agrees(one, x)
    assert len(reads) == (name in OTHERS)


def test_proposals_are_committed_all_the_same() -> None:
    one, other = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    heard(one, x)
    other(x)
    assert torch.equal(one.running_mean, other.running_mean)
    assert torch.equal(one.running_var, other.running_var)
    with bn.deferred(one) as pending:
        (found,) = heard(one, x)
        assert pending.moments(one) is found.moments


def test_a_mask_and_channels_last() -> None:
    x, mask = torch.randn(4, 5, 3), torch.rand(4, 5) > 0.4
    weights = mask.double().numpy()
    for layer in (bn.BatchNorm(3, channel_dim=-1), bn.BatchNorm(3, channel_dim=-1).eval()):
        (one,) = heard(layer, x, mask=mask)
        agrees(one, x, axis=2, weights=weights)
        close(one.highest, layer.eval()(x).amax((0, 1)) if not layer.training else one.highest)


def test_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(input=2 * x + 5)

    x = torch.randn(6, 3)
    (one,) = heard(Twice(), x)
    assert one.calls == 2
    agrees(one, torch.cat([x, 2 * x + 5]))


def test_the_output_is_looked_at_before_it_is_changed() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    expected = copy.deepcopy(norm)(x).amax(0)
    model = nn.Sequential(norm, nn.ReLU(inplace=True))
    users = norm.register_forward_hook(lambda module, args, output: output * 0)
    listening = Listening(named_norm_layers(model))
    model(x)
    (one,) = listening.heard()
    listening.end()
    users.remove()
    assert not hooks(model)
    close(one.highest, expected.detach())


def test_layers_that_are_not_called_or_get_nothing() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": bn.BatchNorm1d(3)})
    listening = Listening(named_norm_layers(model))
    model["b"](torch.empty(0, 3))
    (one,) = listening.heard()
    listening.end()
    assert (one.name, one.highest) == ("b", None)
    assert one.moments is not None
    assert np.asarray(one.moments.count) == 0


def test_replicas_of_other_devices_are_not_meant() -> None:
    layer = bn.BatchNorm1d(3)
    listening = Listening([("", layer)])
    replica = copy.copy(layer)
    replica.weight = nn.Parameter(torch.empty(3, device="meta"))
    replica._parameters = {"weight": replica.weight, "bias": None}
    for listener in replica._listeners:
        listener(replica, bn.Moments.empty(3))
    assert not listening.heard()
    listening.end()
