"""The networks: pairs that differ in the normalisation and in nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from batchnorm.modules import BatchNorm1d, BatchNorm2d
from batchnorm.study.networks import GRID, LAYERS, OURS, TORCH, Block, Layers, Placement, Unit, perceptron, residual
from support.tolerances import AGAINST_TORCH

PLACEMENTS: tuple[Placement, ...] = ("before", "after", "none")
IMAGES, VECTORS = (3, 6, 6), (20,)


def dense(seed: int, placement: Placement, layers: Layers = OURS) -> tuple[nn.Sequential, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return perceptron(64, (32, 16), 10, placement=placement, layers=layers, generator=generator), generator


def deep(
    seed: int, placement: Placement, layers: Layers = OURS, shape: tuple[int, ...] = IMAGES
) -> tuple[nn.Sequential, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return residual(shape, 8, 2, 10, placement=placement, layers=layers, generator=generator), generator


Maker = Callable[..., tuple[nn.Sequential, torch.Generator]]
MAKERS: list[Maker] = [dense, deep]


def maps(network: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_equal_generators_give_equal_maps_and_go_on_with_the_same_numbers(make: Maker, layers: Layers) -> None:
    plain, after_plain = make(3, "none")
    following = torch.randperm(100, generator=after_plain)
    for placement in ("before", "after"):
        normalized, after = make(3, placement, layers)
        for ours, theirs in zip(maps(normalized), maps(plain), strict=True):
            assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(torch.randperm(100, generator=after), following)


@pytest.mark.parametrize("make", MAKERS)
def test_another_seed_gives_other_weights(make: Maker) -> None:
    one, other = (maps(make(seed, "none")[0]) for seed in (3, 4))
    assert not any(torch.equal(a.weight, b.weight) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("make", MAKERS)
def test_the_global_generator_is_neither_read_nor_moved(make: Maker) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(3, "before")[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(maps(first)[0].weight, maps(make(3, "before")[0])[0].weight)


@pytest.mark.parametrize("make", MAKERS)
def test_only_maps_before_a_normalisation_have_no_bias_and_biases_are_zero(make: Maker) -> None:
    *hidden, last = maps(make(0, "before")[0])
    assert all(linear.bias is None for linear in hidden)
    assert last.bias is not None
    for placement in ("after", "none"):
        for linear in maps(make(0, placement)[0]):
            assert linear.bias is not None
            assert torch.count_nonzero(linear.bias) == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_are_hes(placement: Placement) -> None:
    generator = torch.Generator().manual_seed(0)
    first, last = maps(perceptron(256, (512,), 512, placement=placement, layers=OURS, generator=generator))
    # 131,072 and 262,144 draws: the standard error of the spread is below 0.2 %.
    assert first.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.01)
    assert last.weight.std().item() == pytest.approx((1 / 512) ** 0.5, rel=0.01)
    generator = torch.Generator().manual_seed(0)
    _, convolution, *_ = maps(residual((3, 8, 8), 64, 1, 10, placement=placement, layers=OURS, generator=generator))
    assert convolution.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # 36,864 draws


def test_layers() -> None:
    assert [type(module) for module in dense(0, "before")[0]] == [
        nn.Flatten,
        nn.Linear,
        Unit,
        nn.Linear,
        Unit,
        nn.Linear,
    ]
    generator = torch.Generator()
    network = perceptron(4, (3,), 2, placement="none", layers=OURS, generator=generator, dropout=0.25)
    assert [type(module) for module in network] == [nn.Flatten, nn.Linear, Unit, nn.Dropout, nn.Linear]
    assert network[3].p == 0.25
    assert [type(module) for module in deep(0, "none")[0]] == [
        nn.Conv2d,
        Unit,
        Block,
        Block,
        nn.AdaptiveAvgPool2d,
        nn.Flatten,
        nn.Linear,
    ]
    assert maps(deep(0, "none")[0])[-1].in_features == 8 * GRID**2
    assert [type(module) for module in deep(0, "none", shape=VECTORS)[0]] == [nn.Linear, Unit, Block, Block, nn.Linear]


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_are_whose_they_are_said_to_be(name: str) -> None:
    expected = {"ours": (BatchNorm1d, BatchNorm2d), "torch": (nn.BatchNorm1d, nn.BatchNorm2d)}[name]
    for make, kind in zip(MAKERS, expected, strict=True):
        for placement in ("before", "after"):
            kinds = {type(m) for m in make(0, placement, LAYERS[name])[0].modules() if "BatchNorm" in type(m).__name__}
            assert kinds == {kind}
        assert not [m for m in make(0, "none", LAYERS[name])[0].modules() if "BatchNorm" in type(m).__name__]


def normalised(x: Tensor) -> Tensor:
    """The definition, at gamma 1 and beta 0."""
    axes = [0, *range(2, x.ndim)]
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + 1e-5).sqrt()


def expected_unit(placement: Placement, x: Tensor, shortcut: Tensor | float) -> Tensor:
    if placement == "before":
        return torch.relu(normalised(x) + shortcut)
    return normalised(torch.relu(x + shortcut)) if placement == "after" else torch.relu(x + shortcut)


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_a_unit_is_its_formula(layers: Layers, placement: Placement, images: bool, added: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (16, 5, 4, 4) if images else (16, 5)
    x, shortcut = (torch.randn(shape, generator=generator) * 2 + 1 for _ in range(2))
    unit = Unit(5, placement, layers, images=images)
    relative, absolute = AGAINST_TORCH[torch.float32]
    torch.testing.assert_close(
        unit(x, residual=shortcut if added else None),
        expected_unit(placement, x, shortcut if added else 0.0),
        rtol=relative,
        atol=absolute,
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_block_is_its_formula(placement: Placement) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 5, 5, generator=generator)
    block = Block(3, True, placement, OURS, generator)
    inner = expected_unit(placement, block.map1(x), 0.0)
    relative, absolute = AGAINST_TORCH[torch.float32]
    torch.testing.assert_close(block(x), expected_unit(placement, block.map2(inner), x), rtol=relative, atol=absolute)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_shapes(placement: Placement) -> None:
    assert dense(0, placement)[0](torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert deep(0, placement)[0](torch.randn(5, *IMAGES)).shape == (5, 10)
    assert deep(0, placement, shape=VECTORS)[0](torch.randn(5, *VECTORS)).shape == (5, 10)
