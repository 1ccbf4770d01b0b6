"""One pass shows exact populations, batches and samples; the model is as before."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.observation import Observation
from batchnorm.diagnosis.observing import MOST_CHANNELS, observe
from batchnorm.errors import CountError
from batchnorm.population.batches import default_forward
from diagnosis.networks import convolutional, labelled
from support import oracle, tolerances
from support.comparison import close


def seen(model: nn.Module, batches: Any, **options: Any) -> Observation:
    before = copy.deepcopy(model.state_dict())
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    observation = observe(model, batches, forward=default_forward, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())
    return observation


@pytest.mark.parametrize("ours", [False, True])
def test_populations_are_those_of_recalibration(ours: bool) -> None:
    torch.manual_seed(0)
    model, batches = convolutional(ours=ours), labelled()
    observation = seen(model, batches)
    assert (observation.batches, observation.samples, observation.passes) == (8, 64, 1.0)
    exact = copy.deepcopy(model)
    bn.recalibrate(exact, batches)
    for name, layer in observation.layers.items():
        close(layer.population.mean, exact.get_submodule(name).running_mean.double(), tolerances.PARTS)
        close(layer.variance, exact.get_submodule(name).running_var.double(), tolerances.PARTS)
        assert (layer.calls, layer.exact, len(layer.batches)) == (1, True, 8)
        whole = sum(layer.batches[1:], start=layer.batches[0])
        close(whole.m2, layer.population.m2, tolerances.PARTS)


SHAPES = [((8, 5), 1), ((8, 5, 7), 1), ((8, 7, 5), -1), ((8, 5, 4, 3), 1), ((8, 5, 2, 3, 4), 1)]


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_batches_and_samples_are_the_oracles(shape: tuple[int, ...], channel_dim: int) -> None:
    model = bn.BatchNorm(5, channel_dim=channel_dim)
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 2 + i for i in range(3)]
    layer = seen(model, batches).layers[""]
    for moments, x in zip(layer.batches, batches, strict=True):
        n, mean, m2 = oracle.moments(x.double().numpy(), channel_dim)
        assert moments.count == n
        close(moments.mean, mean, tolerances.STATISTIC)
        close(moments.m2, m2, relative=tolerances.STATISTIC)
    samples = [sample.double().movedim(channel_dim % len(shape) - 1, 0).reshape(5, -1) for x in batches for sample in x]
    close(layer.sample_means, torch.stack([sample.mean(1) for sample in samples]), tolerances.STATISTIC)
    assert layer.batch_of.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert layer.sample_values == samples[0].shape[1]
    assert layer.input.shape == shape
    assert layer.input.channel_dim == channel_dim % len(shape)


def test_memory_formats_and_many_channels() -> None:
    model, x = nn.BatchNorm2d(200), torch.randn(4, 200, 3, 3)
    contiguous, last = (seen(model, [x.to(memory_format=m)]) for m in (torch.contiguous_format, torch.channels_last))
    assert [o.layers[""].input.channels_last for o in (contiguous, last)] == [False, True]
    close(contiguous.layers[""].population.mean, last.layers[""].population.mean, tolerances.STATISTIC)
    channels = contiguous.layers[""].channels
    assert len(channels) == MOST_CHANNELS == len(set(channels.tolist()))
    close(contiguous.layers[""].sample_means, x.double().mean((2, 3))[:, channels], tolerances.STATISTIC)


class Twice(nn.Module):
    """Calls one layer twice, another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shared(self.other(self.shared(x)) * 3 + 1)
        return y


def test_a_layer_that_is_called_twice_is_watched() -> None:
    model = Twice()
    batches = [torch.randn(16, 4) for _ in range(3)]
    observation = seen(model, batches)
    shared, other = observation.layers["shared"], observation.layers["other"]
    assert (shared.calls, shared.exact, other.exact, observation.passes) == (2, False, True, 1.0)
    first, second = shared.by_call
    assert first.count == second.count == 48
    close(first.mean, torch.cat(batches).double().mean(0), tolerances.STATISTIC)
    assert (second.mean - first.mean).abs().min() > 0.5
    assert shared.population.count == 96
    assert other.by_call == []


def test_layers_without_statistics_and_frozen_ones_are_watched() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), bn.BatchNorm1d(4), nn.BatchNorm1d(4))
    bn.freeze(model[1])
    model[1].running_mean += 2
    x = torch.randn(32, 4)
    layers = seen(model, [x]).layers
    assert all(layers[name].exact for name in "012")
    normalised = model[0](x)
    close(layers["1"].population.mean, normalised.double().mean(0).detach(), tolerances.OUTPUT)
    close(layers["2"].population.mean, (normalised - 2).double().mean(0).detach(), 1e-4)  # what the frozen one makes


def test_batches_that_take_different_ways() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) if len(x) > 10 else self.b(x)
            return y

    observation = seen(Either(), [torch.randn(n, 4) for n in (16, 8, 16)])
    assert {name: len(layer.batches) for name, layer in observation.layers.items()} == {"a": 2, "b": 1}
    assert not any(layer.exact for layer in observation.layers.values())
    assert observation.passes == 2.0
    assert [name for name, _ in observation.skipped] == ["a", "b"]
    assert "needs batches that call the same layers" in observation.skipped[0].reason


def test_what_is_not_finite_is_found_and_left_out() -> None:
    torch.manual_seed(0)
    model, batches = convolutional(), [x for x, _ in labelled()]
    clean = seen(model, [x for i, x in enumerate(batches) if i not in (2, 5)])
    batches[2][0, 1, 3, 3] = torch.nan
    batches[5][3, 0, 0, 0] = torch.inf
    observation = seen(model, iter(batches))
    assert set(observation.non_finite) == {"1"}
    assert (observation.non_finite["1"].batch, observation.non_finite["1"].channels) == (2, 8)
    for name, layer in observation.layers.items():
        close(layer.population.mean, clean.layers[name].population.mean, tolerances.PARTS)
        assert len(layer.batches) == 6
    nothing = seen(model, [torch.full((2, 3, 8, 8), torch.nan)])
    assert set(nothing.non_finite) == {"1"}
    assert nothing.layers == {}


def test_padding_at_the_ends_of_samples() -> None:
    x = torch.randn(4, 3, 10)
    x[0, :, 6:] = 0
    x[1, :, 9:] = 0
    x[2, :, 2:] = 0.5
    assert seen(nn.BatchNorm1d(3), [x]).layers[""].padding == pytest.approx((3 + 0 + 7 + 0) / 40)
    assert seen(nn.BatchNorm1d(3), [torch.randn(4, 3)]).layers[""].padding is None


def test_some_batches_are_kept_with_their_outputs() -> None:
    torch.manual_seed(0)
    model, batches = convolutional(), labelled()
    observation = seen(model, batches)
    assert [any(kept is batch for batch in batches) for kept in observation.kept] == [True, True]
    exact = copy.deepcopy(model)
    bn.recalibrate(exact, batches)
    for content, output in zip(observation.kept, observation.outputs, strict=True):
        close(output, exact.eval()(content[0]).detach(), 1e-5)


def test_a_small_memory_limit_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Twice()
    batches = [torch.randn(16, 4) for _ in range(5)]
    for name, layer in seen(model, batches, memory_limit=0).layers.items():
        expected = seen(model, batches).layers[name]
        assert len(layer.batches) == len(expected.batches)
        close(layer.population.mean, expected.population.mean, tolerances.PARTS)
        close(layer.sample_means, expected.sample_means, tolerances.PARTS)


def test_masks_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x, mask=x[:, 0] > 0)
            return y

    x = torch.randn(8, 3, 5)
    layer = seen(Masked(), [x]).layers["norm"]
    n, mean, _ = oracle.moments(x.double().numpy(), 1, (x[:, 0] > 0).double().numpy())
    assert layer.population.count == n
    close(layer.population.mean, mean, tolerances.STATISTIC)
    assert layer.sample_means.numel() == 0


def test_errors_leave_no_trace() -> None:
    model = convolutional()
    before = copy.deepcopy(model.state_dict())

    def batches() -> Any:
        yield from labelled()[:2]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        observe(model, batches(), forward=default_forward)
    with pytest.raises(CountError, match="got 0 batches"):
        observe(model, [], forward=default_forward)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_one_value_for_each_channel() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    layers = seen(model, [torch.randn(1, 3)]).layers
    assert [layers[name].population.count for name in "01"] == [1, 1]
    assert np.all(layers["0"].population.m2.numpy() == 0)
