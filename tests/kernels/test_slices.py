"""The reference a few channels at a time: the reference's values, and no float64 copy of a whole input."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm import ops
from batchnorm.errors import OptionError
from batchnorm.kernels import reference, slices
from support.comparison import close
from support.operations import assert_the_oracles, assert_the_oracles_of_what_counts, masked_step, masks
from support.samples import Layout, Sample

OPERATIONS = SimpleNamespace(**{name: slices.operation(name) for name in ops.OPERATIONS})
LAYOUTS = [
    Layout("(N, C)", (37, 5)),
    Layout("(N, L, C)", (4, 9, 5), -1),
    Layout("(N, C, H, W)", (3, 5, 5, 9)),
    Layout("(N, C, H, W) channels_last", (3, 5, 5, 4), 1, "channels_last"),
    Layout("(C, N)", (5, 70), 0),
]


@pytest.fixture(params=[1, 2, 5], ids=lambda channels: f"{channels} channels")
def channels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a slice, for the largest of the inputs."""
    monkeypatch.setattr(slices, "VALUES", 135 * request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_oracles_values(layout: Layout, dtype: torch.dtype, channels: int) -> None:
    assert_the_oracles(OPERATIONS, Sample(layout, "silu", True, dtype))
    assert_the_oracles(OPERATIONS, Sample(layout, None, False, dtype, affine=False))


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_masks(layout: Layout, kind: str, channels: int) -> None:
    sample = Sample(layout, "relu", True)
    assert_the_oracles_of_what_counts(OPERATIONS, sample, kind)
    t = sample.tensors()
    affine = (t["weight"], t["bias"], t["residual"], 1e-5, layout.channel_dim, "relu")
    axis = layout.channel_dim % len(layout.shape)
    for mask in (
        masks(sample)[kind].unsqueeze(axis),  # one for all channels
        (torch.rand(layout.shape) > 0.3).to(getattr(torch, kind)),  # a value for every value: a count for each channel
    ):
        steps = (masked_step(operations, t, affine, mask) for operations in (OPERATIONS, reference))
        for actual, expected in zip(*steps, strict=True):
            close(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_results_lie_as_the_references(layout: Layout, channels: int) -> None:
    t = Sample(layout, "relu", True).tensors()
    affine = (t["weight"], t["bias"], t["residual"], 1e-5, layout.channel_dim, "relu")
    for actual, expected in zip(
        *(masked_step(operations, t, affine, None) for operations in (OPERATIONS, reference)), strict=True
    ):
        assert actual.stride() == expected.stride()
    x, expected = t["x"].clone(), reference.normalize(t["x"], t["weight"], t["weight"].abs(), *affine)
    assert OPERATIONS.normalize_(x, t["weight"], t["weight"].abs(), *affine) is None
    close(x, expected)


def test_a_batch_is_counted_once(channels: int) -> None:
    x, counter = torch.randn(27, 5, 5), torch.tensor(3)
    running = torch.zeros(5), torch.ones(5), counter, torch.zeros(5, dtype=torch.int64)
    alone = [t.clone() for t in running]
    options: tuple[Any, ...] = (None, None, None, 1e-5, 1, None, None)
    steps = (
        (*OPERATIONS.forward_commit(x, *options, *running, None), *running),
        (*reference.forward_commit(x, *options, *alone, None), *alone),
    )
    for actual, expected in zip(*steps, strict=True):
        close(actual, expected)
    assert counter == 4
    y, *_ = OPERATIONS.forward_commit(x, *options, None, None, None, None, 0.1)
    close(y, steps[0][0])
    with pytest.raises(OptionError, match="got running_mean without running_var"):
        OPERATIONS.forward_commit(x, *options, running[0], None, None, None, 0.1)


class Largest(TorchDispatchMode):
    """The most values of a float64 tensor that any operator makes."""

    most = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [t for t in _pytree.tree_leaves(result) if isinstance(t, Tensor) and t.dtype == torch.float64]
        self.most = max(self.most, *(t.numel() for t in made), 0)
        return result


def test_no_float64_copy_of_x_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "VALUES", 2**10)
    t = {name: torch.randn(4, 16, 8, 8) for name in ("x", "dy", "residual")}
    affine = (torch.ones(16), torch.zeros(16), t["residual"], 1e-5, 1, "silu")
    mask = torch.rand(4, 8, 8) > 0.3
    for operations, bound in ((OPERATIONS, 2**10), (reference, t["x"].numel())):
        with Largest() as largest:
            masked_step(operations, t, affine, mask)
        assert largest.most == bound


def test_every_argument_of_every_operation_is_known() -> None:
    """A new one has to be of all channels, of a channel, or of x's shape."""
    names = {p for name in ops.OPERATIONS for p in inspect.signature(getattr(reference, name)).parameters}
    whole = {"eps", "channel_dim", "activation", "momentum", "mask", "count"}
    whole |= {"domain", "domains"}  # with which nothing is cut
    committed = {"running_mean", "running_var", "num_batches_tracked", "num_batches_skipped"}
    assert names == {*slices._OF_X, *slices._OF_A_CHANNEL} | whole | committed


def test_samples_of_several_domains_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an (N, C) input, a table could not be told from an input."""
    monkeypatch.setattr(slices, "VALUES", 4)
    x, domain = torch.randn(3, 8), torch.tensor([0, 1, 0])
    options = (None, None, None, 1e-5, 1, None, None, domain, 2)
    actual, expected = slices.operation("forward")(x, *options), reference.forward(x, *options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
