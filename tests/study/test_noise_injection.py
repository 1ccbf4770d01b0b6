"""The noise after batch normalization."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.study.networks import OURS, TORCH, Layers, perceptron
from batchnorm.study.noise_injection import Noise, add_noise


def passes(count: int, features: int = 4, rows: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of each feature of standard normal values, pass by pass."""
    noise = Noise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    outputs = torch.stack([noise(torch.randn(rows, features, generator=generator)) for _ in range(count)])
    return outputs.mean(1), outputs.std(1, correction=0)


def test_mean_and_spread_change_with_every_pass_and_feature() -> None:
    means, stds = passes(200)
    # 2,000 rows leave 0.022 of noise in a mean.
    assert means.abs().max() < 0.5 + 0.1
    assert means.std() == pytest.approx(1 / 12**0.5, rel=0.05)  # of mu, uniform over a length of 1
    assert means.mean().abs() < 0.05
    # Squared: sigma^2, of s 0.1^2, and of m 0.2^2 / 12; sigma is uniform from 1 to 1.25.
    expected = (1.25**3 - 1) / (3 * 0.25) + 0.01 + 0.04 / 12
    assert stds.square().mean() == pytest.approx(expected, rel=0.02)
    assert stds.max() > 1.2
    assert stds.min() < 1.05
    assert (means[1:] - means[:-1]).abs().mean() > 0.2
    assert (means[:, 1:] - means[:, :-1]).abs().mean() > 0.2


def test_values_of_a_feature_get_their_own_noise() -> None:
    output = Noise(torch.Generator().manual_seed(0))(torch.zeros(1000, 3))
    assert output.std(0).numpy() == pytest.approx([0.2 / 12**0.5] * 3, rel=0.1)


def test_inference_is_without() -> None:
    noise = Noise(torch.Generator().manual_seed(0))
    x = torch.randn(5, 3)
    assert not torch.equal(noise(x), x)
    assert torch.equal(noise.eval()(x), x)


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_the_network_is_the_same_but_for_the_noise(layers: Layers) -> None:
    def made() -> nn.Sequential:
        generator = torch.Generator().manual_seed(0)
        return perceptron(6, (8, 5), 3, placement="before", layers=layers, generator=generator)

    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    quiet = made()
    loud = add_noise(made(), layers, 0)
    assert len(list(loud.parameters())) == len(list(quiet.parameters()))
    assert not torch.allclose(loud(x), quiet(x), atol=0.1)
    noises = {id(module) for module in loud.modules() if isinstance(module, Noise)}
    assert len(noises) == 1
    for module in loud.modules():
        if isinstance(module, Noise):
            module.eval()
    torch.testing.assert_close(loud(x), quiet(x))
