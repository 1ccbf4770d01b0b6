"""The networks: pairs that differ in the normalisation and in nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.modules import BatchNorm1d
from batchnorm.study.networks import perceptron


def made(seed: int, *, normalized: bool) -> tuple[nn.Sequential, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return perceptron(64, (32, 16), 10, normalized=normalized, generator=generator), generator


def linears(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def test_a_pair_starts_from_the_same_weights_and_goes_on_with_the_same_numbers() -> None:
    (normalized, after), (plain, after_plain) = made(3, normalized=True), made(3, normalized=False)
    for ours, theirs in zip(linears(normalized), linears(plain), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(torch.randperm(100, generator=after), torch.randperm(100, generator=after_plain))


def test_another_seed_gives_other_weights() -> None:
    one, other = (linears(made(seed, normalized=False)[0]) for seed in (3, 4))
    assert not any(torch.equal(a.weight, b.weight) for a, b in zip(one, other, strict=True))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = made(3, normalized=True)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(linears(first)[0].weight, linears(made(3, normalized=True)[0])[0].weight)


def test_layers() -> None:
    kinds = [type(module) for module in made(0, normalized=True)[0]]
    assert kinds == [nn.Linear, BatchNorm1d, nn.Linear, BatchNorm1d, nn.Linear]
    kinds = [type(module) for module in made(0, normalized=False)[0]]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    for module in made(0, normalized=True)[0]:
        if isinstance(module, BatchNorm1d):
            assert module.activation == "relu"


def test_only_layers_without_a_normalisation_have_a_bias_and_it_is_zero() -> None:
    assert [linear.bias is not None for linear in linears(made(0, normalized=True)[0])] == [False, False, True]
    for linear in linears(made(0, normalized=False)[0]):
        assert torch.count_nonzero(linear.bias) == 0


@pytest.mark.parametrize("normalized", [True, False])
def test_weights_are_hes(normalized: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    first, last = linears(perceptron(256, (512,), 512, normalized=normalized, generator=generator))
    # 131,072 and 262,144 draws: the standard error of the spread is below 0.2 %.
    assert first.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.01)
    assert last.weight.std().item() == pytest.approx((1 / 512) ** 0.5, rel=0.01)


def test_shapes() -> None:
    assert made(0, normalized=True)[0](torch.zeros(5, 64)).shape == (5, 10)
