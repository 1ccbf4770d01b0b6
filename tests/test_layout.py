from __future__ import annotations

import itertools

import pytest
import torch

from batchnorm import layout
from batchnorm.errors import ShapeError
from batchnorm.functional import batch_norm


@pytest.mark.parametrize(("ndim", "channel_dim", "axis"), [(2, 1, 1), (4, 1, 1), (3, -1, 2), (5, -5, 0)])
def test_channel_axis(ndim: int, channel_dim: int, axis: int) -> None:
    assert layout.channel_axis(ndim, channel_dim) == axis


@pytest.mark.parametrize(
    ("ndim", "channel_dim", "message"),
    [(1, 0, "rank 1"), (0, 0, "rank 0"), (2, 2, r"channel_dim=2.*\[-2, 1\]"), (3, -4, "channel_dim=-4")],
)
def test_no_such_axis(ndim: int, channel_dim: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        layout.channel_axis(ndim, channel_dim)


def test_the_rest_are_observations() -> None:
    assert layout.observed_dims(4, 1) == (0, 2, 3)
    assert layout.observed_shape((2, 3, 4, 5), 1) == (2, 4, 5)
    assert layout.count((2, 3, 4, 5), 1) == 40
    assert layout.count((0, 3), 1) == 0


def test_per_channel_broadcasts_along_the_axis() -> None:
    x, v = torch.zeros(2, 3, 4), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal((x + layout.per_channel(v, 3, 1))[1, :, 2], v)
    assert torch.equal((x.mT + layout.per_channel(v, 3, 2))[0, 1], v)


def test_vectors_and_shapes() -> None:
    layout.check_vector(None, "weight", 3)
    layout.check_vector(torch.zeros(3), "weight", 3)
    for bad in (torch.zeros(4), torch.zeros(1, 3), torch.zeros(())):
        with pytest.raises(ShapeError, match=r"got weight of shape .*it must have shape \(3,\)"):
            layout.check_vector(bad, "weight", 3)
    x = torch.zeros(2, 3)
    layout.check_same_shape(torch.ones(2, 3), "residual", x)
    with pytest.raises(ShapeError, match=r"got residual of shape \(1, 3\) for an input of shape \(2, 3\)"):
        layout.check_same_shape(torch.ones(1, 3), "residual", x)


def test_a_result_is_laid_out_as_the_input_suggests() -> None:
    result = torch.randn(2, 3, 4, 5)
    last = result.contiguous(memory_format=torch.channels_last)
    for x, expected in ((result, result), (last, last), (last.permute(0, 3, 1, 2).permute(0, 2, 3, 1), last)):
        laid_out = layout.laid_out(result, x)
        assert laid_out.stride() == expected.stride()
        assert torch.equal(laid_out, result)
    assert layout.laid_out(result, result.transpose(2, 3).contiguous().transpose(2, 3)).is_contiguous()


@pytest.mark.parametrize("rank", [4, 5])
def test_results_lie_as_torchs_for_every_small_shape_order_and_step(rank: int) -> None:
    """Sizes of 1 have strides that say nothing: there the rule is easily another."""
    for shape in itertools.product((1, 2, 3), (1, 2), (1, 2), *[(1, 2)] * (rank - 3)):
        for order, step in itertools.product(itertools.permutations(range(rank)), (1, 2)):
            wide = torch.zeros([shape[dim] * step for dim in order])[(slice(None, None, step),) * rank]
            x = wide.permute([order.index(dim) for dim in range(rank)])
            statistics = torch.zeros(shape[1]), torch.ones(shape[1])
            expected = torch.nn.functional.batch_norm(x, *statistics).stride()
            assert layout.laid_out(torch.zeros(shape), x).stride() == expected, (shape, x.stride())
            assert batch_norm(x, *statistics).stride() == expected, (shape, x.stride())
