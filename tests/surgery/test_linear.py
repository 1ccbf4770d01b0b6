"""A scale and shift inside a linear layer's weights: equal to it outside, in float64."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from batchnorm.surgery import linear
from batchnorm.surgery.linear import Affine, LinearLayer
from batchnorm.surgery.recognising import linear_layers
from support.comparison import close
from support.networks import draw

CLASSES: dict[tuple[int, bool], Any] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def spread(values: Tensor, y: Tensor, axis: int) -> Tensor:
    return values.view([-1 if dim == axis else 1 for dim in range(y.dim())])


def recognised(layer: nn.Module, shape: tuple[int, ...]) -> LinearLayer:
    with linear_layers(layer) as known:
        layer.double()(draw(*shape))
    answer = known[layer]
    assert isinstance(answer, LinearLayer)
    return answer


@st.composite
def layers(draw: st.DrawFn, transposed: st.SearchStrategy[bool]) -> tuple[Any, tuple[int, ...]]:
    """A layer and the shape of an input."""
    rank, groups = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    if rank == 0:
        into = draw(st.integers(1, 5))
        layer = nn.Linear(into, draw(st.integers(1, 5)), bias=draw(st.booleans()))
        return layer.double(), (3, into) if draw(st.booleans()) else (3, 2, into)
    into, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    turned = draw(transposed)
    if not turned:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    layer = CLASSES[rank, turned](into, out, kernel, stride, padding=draw(st.integers(0, kernel - 1)), **options)
    return layer.double(), (2, into, *[5] * rank)


@given(layers(st.booleans()))
def test_after(case: tuple[Any, tuple[int, ...]]) -> None:
    layer, shape = case
    y = layer(draw(*shape))
    known = recognised(layer, shape)
    axis = linear.channel_axis(known, y.dim())
    scale, shift = draw(2, y.shape[axis])
    weights = linear.after(known, linear.weights(known), Affine(scale, shift))
    expected = y * spread(scale, y, axis) + spread(shift, y, axis)
    known.changed(layer, weights)
    actual = layer(draw(*shape))
    close(actual, expected)


@given(layers(st.just(False)))
def test_before(case: tuple[Any, tuple[int, ...]]) -> None:
    layer, shape = case
    x = draw(*shape)
    known = recognised(layer, shape)
    axis = linear.channel_axis(known, x.dim())
    scale, shift = draw(2, shape[axis])
    expected = layer(x * spread(scale, x, axis) + spread(shift, x, axis))
    if known.why_not_before is None:
        known.changed(layer, linear.before(known, linear.weights(known), Affine(scale, shift)))
        close(layer(x), expected)


def test_an_exact_class_is_asked_for() -> None:
    class Mine(nn.Conv2d):
        """May do anything."""

    assert linear.is_of_torch(nn.Conv2d(2, 2, 1))
    assert not linear.is_of_torch(Mine(2, 2, 1))
    assert not linear.is_of_torch(nn.Bilinear(2, 2, 2))


def test_where_the_channels_are() -> None:
    product, convolution = recognised(nn.Linear(2, 2), (3, 2)), recognised(nn.Conv1d(2, 2, 1), (3, 2, 4))
    assert linear.channel_axis(product, 3) == 2
    assert linear.channel_axis(convolution, 3) == 1
    assert linear.channel_axis(convolution, 2) is None  # (C, L): no samples
