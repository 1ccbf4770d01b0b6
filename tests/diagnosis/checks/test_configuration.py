"""BN101 to BN106: where each fires, and where it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.subject import subject_of_state_dict
from diagnosis.checking import draw, found, remedied, severities

CODES = ("BN101", "BN102", "BN103", "BN104", "BN105", "BN106")
RANKS = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5, bn.BatchNorm1d: 3, bn.BatchNorm2d: 4}
RANKS |= {bn.BatchNorm3d: 5, bn.BatchNorm: 4, nn.SyncBatchNorm: 4}


class Subclass(nn.BatchNorm2d):
    """Somebody's own."""


RANKS[Subclass] = 4


@pytest.fixture(params=RANKS, ids=lambda cls: f"{cls.__module__.split('.')[0]}.{cls.__name__}")
def norm(request: pytest.FixtureRequest) -> Any:
    return request.param


def network(norm: Any, **options: Any) -> nn.Module:
    """Two blocks and a head, with the second layer as asked for. Nothing runs it where its ranks do not fit."""
    first = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4, **options), nn.ReLU())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(4, 2))


def batches(norm: Any) -> list[torch.Tensor]:
    return [draw(8, 4, *[2] * (RANKS[norm] - 2))]


@pytest.mark.parametrize("code", CODES)
def test_a_usual_network_gives_nothing(code: str, norm: Any) -> None:
    for training in (True, False):
        assert not found(code, network(norm).train(training))
    assert not found(code, norm(4).eval())
    assert not found(code, subject_of_state_dict(network(norm, momentum=0.99, eps=0.0).state_dict()))


@pytest.mark.parametrize("code", CODES)
def test_layers_without_values_give_nothing(code: str) -> None:
    for layer in (nn.BatchNorm2d(3, device="meta"), nn.LazyBatchNorm2d(), bn.LazyBatchNorm2d()):
        assert not found(code, nn.Sequential(layer))


# BN101


def test_the_other_convention(norm: Any) -> None:
    model = network(norm, momentum=0.99)
    finding = found("BN101", model)["1.1"]
    assert finding.severity == "warning"
    assert "the last batch weighs 99%" in finding.message
    remedied(finding, model)
    assert model[1][1].momentum == 0.01
    assert not found("BN101", model)


def test_momentum_counts_only_where_it_is_used() -> None:
    assert not found("BN101", network(nn.BatchNorm2d, momentum=None))
    assert not found("BN101", network(nn.BatchNorm2d, momentum=0.99, track_running_stats=False))
    assert severities("BN101", network(nn.BatchNorm2d, momentum=0.5)) == {"1.1": "warning"}
    assert not found("BN101", network(nn.BatchNorm2d, momentum=0.49))


# BN102


def test_a_momentum_of_zero(norm: Any) -> None:
    model = network(norm, momentum=0.0)
    finding = found("BN102", model)["1.1"]
    assert finding.severity == "warning"
    remedied(finding, model) if norm is not Subclass else None
    model[1][1].momentum = 0.1
    assert not found("BN102", model)


def test_tracking_that_was_switched_off_beside_statistics(norm: Any) -> None:
    model = network(norm)
    model[1][1].track_running_stats = False
    assert "track_running_stats is False" in found("BN102", model)["1.1"].message
    assert not found("BN104", model)  # inference does use them
    if norm in (nn.BatchNorm2d, bn.BatchNorm2d, bn.BatchNorm):
        before = model[1][1].running_mean.clone()
        model.train()[1][1](draw(8, 4, 2, 2))
        assert torch.equal(model[1][1].running_mean, before)


def test_statistics_that_we_froze_stand_still_on_purpose() -> None:
    model = network(bn.BatchNorm2d, momentum=0.0)
    bn.freeze(model[1])
    assert not found("BN102", model)
    bn.freeze(model[1], statistics=False)
    assert severities("BN102", model) == {"1.1": "warning"}
    assert not found("BN102", network(nn.BatchNorm2d, momentum=0.0, track_running_stats=False))


# BN103


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-8])
def test_an_eps_that_protects_from_nothing(norm: Any, eps: float) -> None:
    model = network(norm, eps=eps)
    finding = found("BN103", model)["1.1"]
    assert finding.severity == "warning"
    assert finding.message.startswith("eps-too-small")
    remedied(finding, model)
    assert model[1][1].eps == 1e-5
    assert not found("BN103", model)


def test_a_small_eps_is_right_beside_small_variances_and_in_float64() -> None:
    model = nn.BatchNorm2d(4, eps=1e-12)
    model.running_var.fill_(1e-6)
    assert not found("BN103", model)
    assert not found("BN103", nn.BatchNorm2d(4, eps=1e-12).double())
    assert severities("BN103", nn.BatchNorm2d(4, eps=0.0, track_running_stats=False)) == {"": "warning"}
    half = nn.BatchNorm2d(4).half()  # torch adds in float32
    assert not found("BN103", half)


def test_an_eps_beside_the_variance(norm: Any) -> None:
    model = network(norm, eps=0.5)
    finding = found("BN103", model)["1.1"]
    assert finding.severity == "warning"
    assert finding.message.startswith("eps-too-large: 0.5 beside a median running variance of 1 takes 18% off")
    model[1][1].running_var.fill_(5.1)
    assert not found("BN103", model)


def test_what_it_takes_off_is_what_the_message_says() -> None:
    layer, x = bn.BatchNorm1d(4, eps=0.3), draw(1000, 4)
    bn.recalibrate(layer, [x])
    said = found("BN103", layer)[""].message
    lost = 1 - float(layer.eval()(x).detach().std(0, correction=0).median())
    assert f"takes {lost:.0%} off" in said


def test_the_usual_eps_of_mobile_networks_is_an_information_at_most() -> None:
    layer = nn.BatchNorm2d(4, eps=1e-3)
    for var, severity in ((0.02, None), (5e-3, "info"), (1e-4, "info"), (9e-9, "info")):
        layer.running_var.fill_(var)
        assert severities("BN103", layer) == ({} if severity is None else {"": severity})
    layer.eps = 2e-3
    layer.running_var.fill_(5e-3)
    assert severities("BN103", layer) == {"": "warning"}


def test_channels_of_zeros_do_not_count() -> None:
    layer = nn.BatchNorm2d(4)
    layer.running_var.copy_(torch.tensor([0.0, 0.0, 5.6e-45, 1.0]))
    assert not found("BN103", layer)
    layer.running_var.zero_()
    assert not found("BN103", layer)


# BN104


def test_a_layer_without_running_statistics(norm: Any) -> None:
    model = nn.Sequential(norm(4), norm(4, track_running_stats=False))
    finding = found("BN104", model)["1"]
    assert finding.severity == "warning"
    if norm is nn.SyncBatchNorm:  # which no CPU runs
        return
    x = batches(norm)
    remedied(finding, model, batches=x)
    assert not found("BN104", model)
    y = model.eval()(x[0])
    torch.testing.assert_close(model(x[0][:2]), y[:2])


def test_statistics_without_a_place() -> None:
    model = network(nn.BatchNorm2d)
    model[0][1].running_mean = None
    model[0][1].running_var = None
    assert severities("BN104", model) == {"0.1": "warning"}
    assert not found("BN104", nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)))


# BN105


def test_one_layer_in_training_mode(norm: Any) -> None:
    model = network(norm).eval()
    model[1][1].train()
    finding = found("BN105", model)["1.1"]
    assert finding.severity == "warning"
    assert "in training mode, in a network in inference mode (9 of the 9 other modules)" in finding.message
    remedied(finding, model)
    assert not found("BN105", model)


@pytest.mark.parametrize("layers", [("1.1",), ("0.1", "1.1")])
def test_layers_in_inference_mode_in_training(norm: Any, layers: tuple[str, ...]) -> None:
    model = network(norm).train()
    for name in layers:
        model.get_submodule(name).eval()
    findings = found("BN105", model)
    assert {name: finding.severity for name, finding in findings.items()} == dict.fromkeys(layers, "warning")
    assert "the next .train() ends it" in findings["1.1"].message
    assert "bn.freeze(model[1][1])" in findings["1.1"].remedy
    for finding in findings.values():
        remedied(finding, model) if norm is not Subclass else model.train()
    assert not found("BN105", model)


def test_frozen_layers_may_be_in_any_mode() -> None:
    for switches in ({}, {"normalization": False}, {"statistics": False, "normalization": True}):
        model = network(bn.BatchNorm2d).train()
        bn.freeze(model[1][1].eval(), **switches)
        assert not found("BN105", model)
    model = network(bn.BatchNorm2d).train()
    bn.freeze(model[1][1].eval(), statistics=False)
    assert severities("BN105", model) == {"1.1": "warning"}


def test_layers_without_statistics_have_no_modes() -> None:
    model = network(nn.BatchNorm2d, track_running_stats=False).eval()
    model[1][1].train()
    assert not found("BN105", model)


def test_the_majority_decides_and_the_model_where_there_is_none() -> None:
    model = network(nn.BatchNorm2d).train()
    model[0].eval()
    assert severities("BN105", model) == {"0.1": "warning"}
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU()).train()
    model[0].eval()  # two of the four others
    assert severities("BN105", model) == {"0.1": "warning"}
    assert not found("BN105", nn.Sequential(network(nn.BatchNorm2d).eval()))  # a new module around a finished network


# BN106


def test_parameters_that_stand_still_beside_statistics_that_move(norm: Any) -> None:
    model = network(norm)
    model[1][1].requires_grad_(False)
    finding = found("BN106", model)["1.1"]
    assert finding.severity == "warning"
    assert "move with every batch" in finding.message
    assert "will move after the next .train()" in found("BN106", model.eval())["1.1"].message
    model.train()
    if norm is not Subclass:
        remedied(finding, model)
        assert not found("BN106", model)


def test_a_network_for_inference_alone_is_fine(norm: Any) -> None:
    model = network(norm).requires_grad_(False)
    assert not found("BN106", model.eval())
    assert severities("BN106", model.train()) == {"0.1": "warning", "1.1": "warning"}


def test_layers_without_parameters_cannot_be_half_frozen() -> None:
    assert not found("BN106", network(nn.BatchNorm2d, affine=False))
    model = network(nn.BatchNorm2d, track_running_stats=False)
    assert not found("BN106", model[1][1].requires_grad_(False))


@pytest.mark.parametrize("switches", [{}, {"statistics": False}, {"affine": False}])
def test_what_we_froze_is_meant_so(switches: dict[str, bool]) -> None:
    model = network(bn.BatchNorm2d)
    bn.freeze(model[1].requires_grad_(False), **switches)
    assert not found("BN106", model)


def test_one_parameter_that_learns_is_enough() -> None:
    model = network(nn.BatchNorm2d)
    model[1][1].bias.requires_grad_(False)
    assert not found("BN106", model)
    torch.nn.utils.prune.l1_unstructured(model[1][1], "weight", 1)  # whose weight is computed from another
    assert not found("BN106", model)


def test_statistics_that_stand_still_are_another_fault() -> None:
    model = network(nn.BatchNorm2d, momentum=0.0)
    model[1][1].requires_grad_(False)
    assert not found("BN106", model)
