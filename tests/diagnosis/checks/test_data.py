"""BN304 to BN308: what comes into layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.checks import data
from batchnorm.diagnosis.observation import NonFinite, Observation
from batchnorm.diagnosis.subject import subject_of_model
from diagnosis.observed import batches_of, draw, found, observe, subject
from support.networks import Block, Calls


def sequential(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


# Constant channels.


def constant(value: float, *, norm: Any = nn.BatchNorm1d, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    """Channel 2 is always the same."""
    x = draw(64, 6)
    x[:, 2] = value
    return nn.Sequential(norm(6, **options)), batches_of(x, 16)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
@pytest.mark.parametrize("affine", [True, False])
def test_a_constant_channel(norm: Any, affine: bool) -> None:
    model, batches = constant(1.5, norm=norm, affine=affine)
    (finding,) = data.constant_channels(subject(model, batches))
    assert (finding.layer, finding.severity) == ("0", "warning")
    assert "1 of 6 channels" in finding.message
    assert "by up to 316" in finding.message
    assert finding.evidence is not None
    assert [row[0] for row in finding.evidence.rows] == ["2"]
    if affine:
        exec(finding.remedy, {"model": model})
        assert found(data.constant_channels, model, batches) == {}


def test_a_convolution_that_gives_its_bias_alone() -> None:
    model = sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[0].weight[1] = 0
    batches = batches_of(draw(16, 3, 6, 6), 8)
    assert found(data.constant_channels, model, batches) == {"1": "warning"}
    nn.init.normal_(model[0].weight)
    assert found(data.constant_channels, model, batches) == {}


@pytest.mark.parametrize(("value", "severity"), [(0.0, {"0": "info"}), (1e-7, {})])
def test_channels_that_are_dead_do_no_harm(value: float, severity: dict[str, str]) -> None:
    model, batches = constant(value)
    assert found(data.constant_channels, model, batches) == severity


def test_gamma_of_0_and_small_variances() -> None:
    model, batches = constant(1.5)
    nn.init.zeros_(model[0].weight)
    assert found(data.constant_channels, model, batches) == {}
    assert found(data.constant_channels, nn.Sequential(nn.BatchNorm1d(6)), [1e-4 * draw(64, 6)] * 2) == {}


# Not finite.


class Overflowing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.half().mul(1e4).mul(1e4).float()


def test_the_first_layer_and_batch() -> None:
    model = sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), Overflowing(), nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    batches = [torch.zeros(4, 6), draw(4, 6)]
    nn.init.zeros_(model[1].bias)
    model[0].eval()
    (finding,) = data.non_finite_activations(subject(model, batches))
    assert (finding.layer, finding.severity) == ("3", "error")
    assert "6 channels in batch 1, out of 2" in finding.message
    del model[2]
    assert found(data.non_finite_activations, model, batches) == {}


def test_the_first_in_the_order_of_calling() -> None:
    model = Calls(lambda m, x: m.a(m.b(x)), a=nn.BatchNorm1d(6), b=nn.BatchNorm1d(6))
    seen = Observation(non_finite={"b": NonFinite("b", 2, 3), "a": NonFinite("a", 2, 6)})
    (finding,) = data.non_finite_activations(subject_of_model(model, data=seen))
    assert finding.layer == "b"


def test_without_a_model_that_is_known() -> None:
    seen = Observation(non_finite={"gone": NonFinite("gone", 0, 1)})
    (finding,) = data.non_finite_activations(subject_of_model(nn.Sequential(), data=seen))
    assert finding.layer == "gone"


# Padding.


def padded(kept: int, *, value: float = 0.0, channels: int = 5, length: int = 20) -> list[Tensor]:
    x = draw(32, channels, length)
    lengths = torch.arange(32) % 5 + kept
    x[(torch.arange(length) >= lengths.view(-1, 1)).unsqueeze(1).expand_as(x)] = value
    return batches_of(x, 8)


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_padding(norm: Any, value: float) -> None:
    (finding,) = data.padding_counted(subject(nn.Sequential(norm(5)), padded(8, value=value)))
    assert (finding.layer, finding.severity) == ("0", "warning")
    assert finding.weight == pytest.approx(9 / 19, abs=0.01)


def test_padding_behind_convolutions_and_with_features_last() -> None:
    model = sequential(
        nn.Conv1d(5, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6)
    )
    assert found(data.padding_counted, model, padded(8)) == {"1": "warning", "4": "warning"}
    last = [x.transpose(1, 2) for x in padded(8)]
    assert found(data.padding_counted, bn.BatchNorm1d(5, channel_dim=-1), last) == {"": "warning"}


@pytest.mark.parametrize(
    "batches",
    [
        batches_of(draw(32, 5, 20), 8),
        batches_of(draw(32, 5, 20).relu(), 8),
        padded(16),  # 18 on average of 20, and the last one is not counted
        padded(8, channels=1),
        padded(3, length=5),
        batches_of(draw(32, 5, 1).expand(32, 5, 20), 8),  # constant all along
    ],
)
def test_no_padding(batches: list[Tensor]) -> None:
    assert found(data.padding_counted, nn.BatchNorm1d(batches[0].shape[1]), batches) == {}


def test_a_mask_says_what_counts() -> None:
    norm = bn.BatchNorm1d(5)
    mask = torch.arange(20) < (torch.arange(8) % 5 + 8).view(-1, 1)
    batches = [{"input": x, "mask": mask} for x in padded(8)]
    given = subject_of_model(norm, data=observe(norm, batches))
    assert list(data.padding_counted(given)) == []


def test_black_borders_are_no_padding() -> None:
    x = draw(16, 3, 12, 12)
    x[:, :, 7:] = 0
    assert found(data.padding_counted, nn.BatchNorm2d(3), batches_of(x, 8)) == {}


# Cancellation.


def far(mean: float, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(draw(*shape, seed=seed).double() + mean).to(dtype) for seed in range(2)]


def test_a_mean_that_is_too_far() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = far(1e6, 8, 3, 16, 16)
    (finding,) = data.cancellation(subject(model, batches))
    assert (finding.layer, finding.severity) == ("0", "warning")
    # What torch's layer really loses on these data.
    x = batches[0].double()
    exact = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    lost = float((model(batches[0]).detach().double() - exact).square().mean((0, 2, 3)).sqrt().max())
    assert finding.weight == pytest.approx(lost, rel=0.5)
    bn.convert(model)
    assert found(data.cancellation, model, batches) == {}


@pytest.mark.parametrize("mean", [0.0, 50.0, 1e3])
def test_a_mean_that_is_near(mean: float) -> None:
    assert found(data.cancellation, nn.BatchNorm2d(3), far(mean, 8, 3, 16, 16)) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_its_own_measure(dtype: torch.dtype) -> None:
    """The input is rounded before any layer sees it: that is not the layer's doing."""
    assert found(data.cancellation, nn.BatchNorm1d(3).to(dtype), far(20.0, 64, 3, dtype=dtype)) == {}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_that_came(layout: torch.memory_format) -> None:
    batches = [x.contiguous(memory_format=layout) for x in far(1e6, 8, 4, 16, 16)]
    assert found(data.cancellation, nn.BatchNorm2d(4), batches) == {"": "warning"}


# Data that moved.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(8))


def images(seed: int, n: int = 64) -> Tensor:
    return draw(n, 3, 10, 10, seed=seed)


@pytest.mark.parametrize("change", [lambda x: x + 0.5, lambda x: 2 * x])
def test_data_that_moved(change: Any) -> None:
    first, second = (batches_of(x, 16) for x in (images(0), change(images(1))))
    (finding,) = data.data_have_moved(subject(network(), first, second))
    assert (finding.layer, finding.severity) == ("1", "warning")
    assert finding.evidence is not None
    assert finding.evidence.rows[0][0] == "1"


@pytest.mark.parametrize("n", [8, 16, 64])
def test_data_of_one_distribution(n: int) -> None:
    for seed in range(5):
        first, second = (batches_of(images(2 * seed + i, n), 8) for i in (0, 1))
        assert found(data.data_have_moved, network(), first, second) == {}


def test_the_order_is_that_of_calling() -> None:
    model = Calls(lambda m, x: m.a(m.b(x).relu()), a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3))
    first, second = (batches_of(x, 16) for x in (images(0), images(1) * torch.tensor([3.0, 1, 1]).view(3, 1, 1) + 1))
    assert found(data.data_have_moved, model, first, second) == {"b": "warning"}


def test_without_second_data() -> None:
    assert found(data.data_have_moved, network(), batches_of(images(0), 16)) == {}


# All of them.


def test_a_network_in_order() -> None:
    first, second = (batches_of(images(seed), 16) for seed in (0, 1))
    given = subject(network(), first, second)
    for check in data.CHECKS:
        assert list(check.run(given)) == []


def test_without_data_nothing_is_said() -> None:
    given = subject(network())
    assert observe(network(), batches_of(images(0), 16)).layers.keys() == {"1", "3.bn1", "3.bn2"}
    for check in data.CHECKS:
        assert list(check.run(given)) == []
