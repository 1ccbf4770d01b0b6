"""BN001 to BN006: where each fires, and where it must not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.observation import Input, Observation, ObservedLayer
from batchnorm.diagnosis.subject import subject_of_state_dict
from diagnosis.checking import draw, found, remedied, severities

CODES = ("BN001", "BN002", "BN003", "BN004", "BN005", "BN006")
KINDS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, (16, 3)),
    "2d": (nn.BatchNorm2d, (8, 3, 4, 4)),
    "3d": (nn.BatchNorm3d, (4, 3, 2, 4, 4)),
    "sync": (nn.SyncBatchNorm, (8, 3, 4, 4)),
    "ours": (bn.BatchNorm, (8, 3, 4, 4)),
    "ours 2d": (bn.BatchNorm2d, (8, 3, 4, 4)),
    "average of all": (lambda n: bn.BatchNorm2d(n, momentum=None), (8, 3, 4, 4)),
    "without affine": (lambda n: nn.BatchNorm2d(n, affine=False), (8, 3, 4, 4)),
}


class Subclass(nn.BatchNorm2d):
    """Somebody's own."""


KINDS["subclass"] = (Subclass, (8, 3, 4, 4))


def two(kind: str = "2d") -> tuple[nn.Module, list[torch.Tensor]]:
    """Two layers, and what they are called with."""
    made, shape = KINDS[kind]
    torch.manual_seed(0)
    return nn.Sequential(made(3), nn.Tanh(), made(3)), [draw(*shape, seed=i) for i in range(3)]


def trained(kind: str = "2d") -> tuple[nn.Module, list[torch.Tensor]]:
    """`two` after some steps, recalibrated."""
    model, batches = two(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for layer in (model[0], model[2]):
        layer.num_batches_tracked.fill_(5)
    if kind == "sync":  # recalibrate takes it, but no forward on a CPU does
        for layer in (model[0], model[2]):
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
        return model.eval(), batches
    bn.recalibrate(model.eval(), batches)
    return model, batches


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_network_gives_nothing(kind: str) -> None:
    model, _ = trained(kind)
    for code in CODES:
        assert not found(code, model)
        assert not found(code, subject_of_state_dict(model.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_changed(kind: str) -> None:
    model, _ = trained(kind)
    model[2].running_var[0] = -1
    before = copy.deepcopy(model.state_dict())
    versions = [tensor._version for tensor in model.state_dict().values()]
    for code in CODES:
        found(code, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert versions == [tensor._version for tensor in model.state_dict().values()]


# BN001


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_were_reset_are_untrained(kind: str) -> None:
    model, batches = trained(kind)
    model[2].reset_running_stats()
    for subject in (model, subject_of_state_dict(model.state_dict())):
        assert severities("BN001", subject) == {"2": "error"}
    if kind != "sync":
        remedied(found("BN001", model)["2"], model, batches=batches)
        assert not found("BN001", model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_is_one_information(kind: str) -> None:
    model, _ = two(kind)
    assert severities("BN001", model) == {"0": "info"}
    assert "all 2 layers" in found("BN001", model)["0"].message
    assert severities("BN001", subject_of_state_dict(model.state_dict())) == {"0": "info"}
    assert "a fresh layer" in found("BN001", model[0])[""].message


def test_usual_initializations_are_fresh() -> None:
    model, _ = two()
    nn.init.zeros_(model[2].weight)  # the end of a residual block
    nn.init.normal_(model[0].weight, 1, 0.02)  # DCGAN's
    nn.init.constant_(model[0].bias, -2.0)
    assert severities("BN001", model) == {"0": "info"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.num_batches_tracked.fill_(7), "its counter is 7"),
        (lambda layer: layer.bias.data.normal_(), "beta has moved"),
        (lambda layer: (layer.bias.data.normal_(), layer.weight.data.normal_()), "gamma and beta have moved"),
    ],
)
def test_what_shows_that_a_layer_was_trained(change: Callable[[Any], object], reason: str) -> None:
    model, _ = two()
    change(model[2])
    findings = found("BN001", model)
    assert {layer: finding.severity for layer, finding in findings.items()} == {"0": "error", "2": "error"}
    assert reason in findings["2"].message
    assert "other layers were trained" in findings["0"].message


def test_a_gamma_without_beta_shows_it_too() -> None:
    model = bn.BatchNorm2d(3, bias=False)
    assert severities("BN001", model) == {"": "info"}
    nn.init.normal_(model.weight)
    assert severities("BN001", model) == {"": "error"}


def test_steps_of_the_optimizer_show_it() -> None:
    for make in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.1)):
        model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
        optimizer = make([model[0].weight])
        assert severities("BN001", model, optimizer=optimizer) == {"1": "info"}
        model[0](draw(2, 4)).sum().backward()
        optimizer.step()
        assert "the optimizer has taken steps" in found("BN001", model, optimizer=optimizer)["1"].message
    adagrad = torch.optim.Adagrad(model.parameters())  # which has a state from the beginning
    assert severities("BN001", model, optimizer=adagrad) == {"1": "info"}


def test_layers_without_running_statistics_show_it() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    assert severities("BN001", model) == {"1": "info"}
    nn.init.normal_(model[0].bias)
    assert severities("BN001", model) == {"1": "error"}


def test_statistics_that_moved_without_a_counter_are_fine() -> None:
    model, _ = trained()
    for layer in (model[0], model[2]):
        layer.num_batches_tracked.zero_()
    assert not found("BN001", model)
    del model[0].num_batches_tracked
    assert not found("BN001", model)


def test_a_layer_that_data_do_not_reach_is_left_to_another_check() -> None:
    model, _ = trained()
    model[2].reset_running_stats()
    seen = ObservedLayer(Input((8, 3, 4, 4), torch.float32, False, 1))
    assert not found("BN001", model, data=Observation(layers={"0": seen}))
    assert severities("BN001", model, data=Observation(layers={"0": seen, "2": seen})) == {"2": "error"}


def test_a_frozen_layer_that_never_learned_is_untrained() -> None:
    model, _ = trained("ours")
    model[2].reset_running_stats()
    bn.freeze(model)
    assert severities("BN001", model) == {"2": "error"}


@pytest.mark.parametrize("code", CODES)
def test_layers_without_values_give_nothing(code: str) -> None:
    for layer in (nn.BatchNorm2d(3, device="meta"), nn.LazyBatchNorm2d(), bn.LazyBatchNorm2d()):
        assert not found(code, nn.Sequential(layer))


# BN002


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_statistics_that_are_not_finite(kind: str, value: float) -> None:
    model, batches = trained(kind)
    model[2].running_mean[1] = value
    model[2].running_var[2] = value
    for subject in (model, subject_of_state_dict(model.state_dict())):
        (finding,) = found("BN002", subject).values()
        assert (finding.layer, finding.severity) == ("2", "error")
        assert "running_mean (1 of 3 channels), running_var (1 of 3 channels)" in finding.message
        assert finding.evidence is not None
        assert [row[0] for row in finding.evidence.rows] == ["1", "2"]
    for code in ("BN001", "BN003", "BN006"):
        assert not found(code, model)
    if kind != "sync":
        remedied(finding, model, batches=batches)
        assert not found("BN002", model)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_are_not_finite_come_from_a_checkpoint(name: str) -> None:
    model, _ = trained()
    before = copy.deepcopy(model.state_dict())
    getattr(model[0], name).data[0] = float("nan")
    finding = found("BN002", model)["0"]
    assert name in finding.message
    remedied(finding, model, before=before)
    assert not found("BN002", model)


# BN003


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("var", [1e-14, 1e-12, 1e-8])
def test_a_channel_far_from_zero_with_next_to_no_variance(kind: str, var: float) -> None:
    model, batches = trained(kind)
    model[2].running_var[1] = var
    model[2].running_mean[1] = 0.5
    for subject in (model, subject_of_state_dict(model.state_dict())):
        finding = found("BN003", subject)["2"]
        assert finding.severity == "warning"
        assert "1 of 3 channels" in finding.message
        assert finding.evidence is not None
        assert [row[0] for row in finding.evidence.rows] == ["1"]
    if kind != "sync":
        remedied(finding, model, batches=batches)
        assert not found("BN003", model)


def test_the_real_cause_is_a_feature_that_does_not_vary() -> None:
    x = draw(64, 3)
    x[:, 2] = 3.0
    model = nn.BatchNorm1d(3)
    for _ in range(200):
        model(x)
    assert severities("BN003", model) == {"": "warning"}
    bn.recalibrate(model, [x])  # the data's own: it is a constant, as healthy networks have some
    assert severities("BN003", model) == {"": "info"}
    x[0, 2] = 3.001
    bn.recalibrate(model, [x])
    assert severities("BN003", model) == {"": "warning"}
    nn.init.zeros_(model.weight[2])
    assert not found("BN003", model)


def test_channels_of_zeros_do_no_harm() -> None:
    x = draw(64, 3)
    x[:, 2] = 0.0
    model = nn.BatchNorm1d(3)
    bn.recalibrate(model, [x])
    assert severities("BN003", model) == {"": "info"}
    model.running_mean[2], model.running_var[2] = 1e-9, 1.4e-13  # behind a ReLU that opened once
    assert severities("BN003", model) == {"": "info"}
    model.running_mean[2], model.running_var[2] = 0.0, 5.6e-45  # what an average of zeros ends at
    assert severities("BN003", model) == {"": "info"}


def test_an_average_on_its_way_down_over_zeros_is_not_yet_the_data_s() -> None:
    x = draw(64, 3)
    x[:, 2] = 0.0
    model = nn.BatchNorm1d(3)
    for _ in range(200):
        model(x)
    assert 1e-10 < float(model.running_var[2]) < 1e-8
    assert severities("BN003", model) == {"": "warning"}


def test_without_eps_a_channel_of_zeros_is_nan() -> None:
    model = nn.BatchNorm1d(3, eps=0.0)
    bn.recalibrate(model, [draw(64, 3) * torch.tensor([1.0, 1.0, 0.0])])
    assert severities("BN003", model) == {"": "warning"}


def test_a_scale_beyond_a_thousand() -> None:
    model, _ = trained()
    model[0].weight.data[0] = 5e3
    finding = found("BN003", model)["0"]
    assert finding.severity == "warning"
    assert "scale beyond 1000" in finding.message
    model[0].weight.data[0] = 1.0
    assert not found("BN003", model)


def test_small_variances_of_a_whole_layer_beside_a_usual_eps_are_fine() -> None:
    model = nn.BatchNorm2d(64, eps=1e-3)
    bn.recalibrate(model, [draw(8, 64, 4, 4) * 0.01 * torch.linspace(0.3, 2, 64).view(1, -1, 1, 1)])
    assert float(model.running_var.min()) < 0.01 * model.eps
    assert not found("BN003", model)
    model.running_var.fill_(1e-9)  # all of them alike: BN103's
    model.running_mean.fill_(0.5)
    assert severities("BN003", model) == {"": "info"}


# BN004


@pytest.mark.parametrize("kind", KINDS)
def test_a_variance_below_zero(kind: str) -> None:
    model, batches = trained(kind)
    model[0].running_var[0] = -0.5
    model[0].running_var[2] = -1e-7
    for subject in (model, subject_of_state_dict(model.state_dict())):
        finding = found("BN004", subject)["0"]
        assert finding.severity == "error"
        assert "2 of 3 channels, down to -0.5: the output of 1 is NaN" in finding.message
        assert finding.evidence is not None
        assert [row[0] for row in finding.evidence.rows] == ["0", "2"]
    assert not found("BN003", model)
    if kind != "sync":
        remedied(finding, model, batches=batches)
        assert not found("BN004", model)


# BN005


@pytest.mark.parametrize("kind", ["1d", "2d", "3d", "sync", "without affine", "subclass"])
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, "3.9%"), (torch.float16, "0.5%")])
def test_statistics_in_half_precision(kind: str, dtype: torch.dtype, share: str) -> None:
    model, _ = trained(kind)
    model[2].to(dtype)
    finding = found("BN005", model)["2"]
    assert finding.severity == "warning"
    assert f"at momentum 0.1, a batch that differs from them by less than {share}" in finding.message
    (of_state,) = found("BN005", subject_of_state_dict(model.state_dict())).values()
    assert of_state.layer == "2"
    if kind != "subclass":  # which may mean something else, so that `convert` leaves it
        remedied(finding, model)
        assert not found("BN005", model)


def test_the_share_is_what_rounding_eats() -> None:
    value = torch.tensor(1.0, dtype=torch.bfloat16)
    for differs, moves in ((1.038, False), (1.041, True)):  # 3.9 % at momentum 0.1
        blended = torch.tensor(0.9 + 0.1 * differs, dtype=torch.float64).to(torch.bfloat16)
        assert (blended != value) == moves


def test_ours_stay_float32_and_say_nothing() -> None:
    model, _ = trained("ours")
    assert not found("BN005", model.half())
    model[0].running_mean = model[0].running_mean.half()
    finding = found("BN005", model)["0"]
    remedied(finding, model)
    assert not found("BN005", model)


def test_the_average_of_all_batches_in_half_precision() -> None:
    model = nn.BatchNorm1d(3, momentum=None).bfloat16()
    assert "256th" in found("BN005", model)[""].message


# BN006


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "without affine"])
def test_channels_without_gamma(kind: str) -> None:
    model, _ = trained(kind)
    nn.init.zeros_(model[0].weight[:2])
    for subject in (model, subject_of_state_dict(model.state_dict())):
        finding = found("BN006", subject)["0"]
        assert finding.severity == "info"
        assert "2 of 3 channels" in finding.message
        assert finding.weight == pytest.approx(2 / 3)
    assert not found("BN003", model)


def test_a_whole_layer_without_gamma_is_how_residual_blocks_begin() -> None:
    model, _ = two()
    nn.init.zeros_(model[2].weight)
    assert not found("BN006", model)
    trained_model, _ = trained()
    nn.init.zeros_(trained_model[2].weight)
    assert severities("BN006", trained_model) == {"2": "info"}
