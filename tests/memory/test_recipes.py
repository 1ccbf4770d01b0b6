"""How results of operations between the layers are computed again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.memory.recipes import ACTIVATIONS, MAX_POOLS, RULES, Recipe, places
from batchnorm.memory.values import Value


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(3).requires_grad_() * 1.0


def recipe_of(result: Tensor, *inputs: Tensor | None) -> Recipe | None:
    values = [None if t is None else Value(t) for t in inputs]
    return RULES[result.grad_fn.name()](result.grad_fn, result, lambda number: values[number])


def again(recipe: Recipe | None) -> Tensor:
    assert recipe is not None
    return recipe.again(*(value.get() for value in recipe.inputs))


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "hardtanh": lambda z: F.hardtanh(z, -0.3, 2.5),
    "leaky_relu": lambda z: F.leaky_relu(z, 0.3),
    "gelu": F.gelu,
    "gelu, tanh": lambda z: F.gelu(z, approximate="tanh"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations(name: str) -> None:
    z = draw(4, 3, 5)
    y = ELEMENTWISE[name](z)
    assert y.grad_fn.name() in ACTIVATIONS
    assert torch.equal(again(recipe_of(y, z)), y)
    assert recipe_of(y, None) is None
    assert recipe_of(y, z[:2]) is None
    assert recipe_of(y, z.double()) is None


def test_every_activation_is_tested() -> None:
    assert {ELEMENTWISE[name](draw(2)).grad_fn.name() for name in ELEMENTWISE} == set(ACTIVATIONS)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: F.max_pool2d(x, 2),
    "overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "dilated": lambda x: F.max_pool2d(x, (2, 3), (1, 2), dilation=2),
    "rounded up": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "of three dimensions": lambda x: F.max_pool3d(x.unsqueeze(2) * 1.0, (1, 2, 2)),
}


@pytest.mark.parametrize("name", POOLS)
def test_max_poolings(name: str) -> None:
    x = draw(2, 3, 9, 11)
    y = POOLS[name](x)
    seen = x if y.dim() == 4 else x.unsqueeze(2)
    saved = y.grad_fn._saved_result1
    recipe = places(saved, seen.shape, MAX_POOLS[y.grad_fn.name()])
    assert again(recipe).dtype == torch.int64
    assert torch.equal(again(recipe), saved)


@pytest.mark.parametrize(
    ("shape", "dimensions", "dtype"),
    [
        ((2, 3, 16, 16), 2, torch.uint8),
        ((2, 3, 16, 17), 2, torch.uint16),
        ((2, 3, 256, 256), 2, torch.uint16),
        ((2, 3, 257, 256), 2, torch.int32),
        ((2, 4, 8, 8), 3, torch.uint8),
        ((2, 5, 8, 8), 3, torch.uint16),
    ],
)
def test_places_are_as_small_as_they_can_be(shape: tuple[int, ...], dimensions: int, dtype: torch.dtype) -> None:
    last = torch.Size(shape[-dimensions:]).numel() - 1
    recipe = places(torch.tensor([[0, last]]), torch.Size(shape), dimensions)
    assert recipe.inputs[0].dtype == dtype
    assert recipe.copied == 2 * dtype.itemsize
    assert again(recipe).tolist() == [[0, last]]


@pytest.mark.parametrize("dim", [1, -1, 0])
@pytest.mark.parametrize("unknown", [None, 0, 1, 2])
def test_concatenations(dim: int, unknown: int | None) -> None:
    parts = [draw(3, 3, 3, seed=i) for i in range(3)]
    y = torch.cat(parts, dim)
    recipe = recipe_of(y, *(None if i == unknown else part for i, part in enumerate(parts)))
    assert torch.equal(again(recipe), y)
    assert recipe.copied == (0 if unknown is None else 3 * 3 * 3 * 4)


def test_concatenations_that_are_kept() -> None:
    a, b, c = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(2, 10, 4, seed=2)
    y = torch.cat([a, b, c], 1)
    assert recipe_of(y, None, None, c) is None  # two parts that nobody knows
    assert recipe_of(y, a, b, None) is None  # more than half would be copied
    assert recipe_of(y, a, b.double(), c) is None
    assert recipe_of(y, a, b, c[:, :9]) is None  # not what was put together


def test_products() -> None:
    scale, x = draw(2, 3, 1, 1).sigmoid(), draw(2, 3, 4, 5)
    for y, inputs in ((scale * x, (scale, x)), (x * scale, (x, scale)), (x * x, (x, x))):
        assert torch.equal(again(recipe_of(y, *inputs)), y)
    assert recipe_of(scale * x, None, x) is None
    assert recipe_of(scale * x, scale, None) is None
    assert recipe_of(scale * x, scale.double(), x) is None
