"""Statistics by property: any shape, layout, dtype and mask, in any pieces, is the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import batchnorm as bn
from batchnorm.call import Call
from batchnorm.functional import batch_norm, normalize, normalize_by_running
from batchnorm.statistics import BatchStatistics
from support import tolerances
from support.comparison import close
from support.strategies import Batch, Spec, assert_running, assert_within, expected, specs

MOMENTA = st.sampled_from([0.1, 1.0, None])


def property_test(*strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """A test of many examples, and a long one of ten times as many."""

    def decorate(holds: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.long)])
        def test(examples: int) -> None:
            checked = settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])(holds)
            given(*strategies)(checked)()

        return test

    return decorate


def layer_for(batch: Batch, spec: Spec, **options: Any) -> bn.BatchNorm:
    layer = bn.BatchNorm(
        spec.shape[batch.axis],
        spec.eps,
        dtype=spec.parameters,
        activation=spec.activation,
        channel_dim=spec.channel_dim,
        **options,
    )
    layer.load_state_dict(layer.state_dict() | {"weight": batch.weight, "bias": batch.bias})
    return layer


def leaves(batch: Batch) -> dict[str, Tensor]:
    """The tensors besides the layer's that gradients are taken of."""
    given = {"x": batch.x, "residual": batch.residual}
    return {name: t.detach().requires_grad_() for name, t in given.items() if t is not None}


def compare(layer: bn.BatchNorm, inputs: dict[str, Tensor], y: Tensor, dy: Tensor, results: dict) -> None:
    """Output and all gradients beside the oracle's."""
    assert y.dtype == inputs["x"].dtype
    wanted = inputs | dict(layer.named_parameters())
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    for name, actual in [("y", y), *zip(wanted, gradients, strict=True)]:
        assert_within(actual, *results[name], name)


def strides_of_torchs(x: Tensor) -> tuple[int, ...]:
    """How torch's own batch norm lays out its output, which does not depend on where the channels are."""
    channels = x.shape[1]
    return torch.nn.functional.batch_norm(x, torch.zeros(channels).to(x), torch.ones(channels).to(x)).stride()


def cut(samples: int, size: int) -> list[slice]:
    """Ghost batches; a remainder of one sample joins the last."""
    starts = list(range(0, samples, size))
    if samples % size == 1 and len(starts) > 1 and size > 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], samples], strict=True)]


@property_test(specs(), MOMENTA)
def test_training(spec: Spec, momentum: float | None) -> None:
    batch, results = expected(spec.batch(), [slice(0, spec.batch().samples)])
    layer = layer_for(batch, spec, momentum=momentum)
    inputs = leaves(batch)
    y = layer(inputs["x"], residual=inputs.get("residual"), mask=batch.mask)
    assert y.stride() == strides_of_torchs(batch.x)
    compare(layer, inputs, y, batch.dy, results)
    assert_running(layer, batch, 1.0 if momentum is None else momentum)


@property_test(specs(), st.integers(1, 10))
def test_ghost_batches(spec: Spec, size: int) -> None:
    batch = spec.batch()
    if batch.x.numel() == batch.samples * batch.x.shape[batch.axis]:
        size += 1  # one sample is one value
    batch, results = expected(batch, cut(batch.samples, size))
    layer = layer_for(batch, spec, virtual_batch_size=size)
    inputs = leaves(batch)
    y = layer(inputs["x"], residual=inputs.get("residual"), mask=batch.mask)
    assert y.stride() == strides_of_torchs(batch.x)
    compare(layer, inputs, y, batch.dy, results)
    assert_running(layer, batch, 0.1)


SIZES = st.lists(st.sampled_from([2, 3, 0, 5]), min_size=1, max_size=5).filter(any)


@property_test(SIZES.flatmap(lambda sizes: st.tuples(st.just(sizes), specs(samples=sum(sizes)))), MOMENTA)
def test_micro_batches_under_deferred(sizes_and_spec: tuple[list[int], Spec], momentum: float | None) -> None:
    sizes, spec = sizes_and_spec
    ends = np.cumsum(sizes).tolist()
    groups = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    batch, results = expected(spec.batch(), [group for group in groups if group.stop > group.start])
    layer = layer_for(batch, spec, momentum=momentum)
    inputs = leaves(batch)
    with bn.deferred(layer) as pending:
        outputs = [
            layer(
                batch.part(inputs["x"], group),
                residual=batch.part(inputs.get("residual"), group),
                mask=batch.mask_of(group),
            )
            for group in groups
        ]
        assert layer.num_batches_tracked == 0
        joined = pending.moments(layer)
    compare(layer, inputs, torch.cat(outputs, batch.sample_axis), batch.dy, results)
    assert_running(layer, batch, 1.0 if momentum is None else momentum)
    assert joined is not None
    assert_moments(joined, batch)


def assert_moments(m: bn.Moments, batch: Batch) -> None:
    n, mean, m2 = batch.moments()
    rounding = tolerances.ASSOCIATIVITY * (1 + float(batch.x.abs().max()))
    close(m.count.double(), n, relative=tolerances.ASSOCIATIVITY)
    # Half precision is added up in float32 for a few steps.
    bound = tolerances.STATISTIC if batch.x.dtype in (torch.float16, torch.bfloat16) else tolerances.ASSOCIATIVITY
    close(m.mean, mean, absolute=rounding + bound * np.sqrt(m2 / max(n, 1)))
    close(m.m2, m2, relative=bound, absolute=10 * rounding * (1 + n))


@property_test(specs(), st.lists(st.integers(0, 9), max_size=5), st.randoms())
def test_moments_of_any_pieces(spec: Spec, places: list[int], random: Random) -> None:
    batch = spec.batch()
    ends = sorted(min(place, batch.samples) for place in places)
    groups = [slice(a, b) for a, b in zip([0, *ends], [*ends, batch.samples], strict=True)]
    random.shuffle(groups)
    pieces = [
        bn.Moments.of(batch.part(batch.x, group), channel_dim=spec.channel_dim, mask=batch.mask_of(group))
        for group in groups
    ]
    assert_moments(sum(pieces, start=bn.Moments.empty(spec.shape[batch.axis])), batch)
    call = Call(batch.x, mask=batch.mask, eps=spec.eps, channel_dim=spec.channel_dim)
    _, proposed = normalize(call, BatchStatistics())
    assert proposed is not None
    assert_moments(proposed, batch)


@property_test(specs(masks=(torch.bool, torch.float32, torch.float64)), st.booleans())
def test_a_mask_of_which_nothing_counts(spec: Spec, ghosts: bool) -> None:
    batch = spec.batch()
    mask = torch.zeros_like(batch.mask)
    layer = layer_for(batch, spec, virtual_batch_size=2 if ghosts else None)
    inputs = leaves(batch)
    y = layer(inputs["x"], residual=inputs.get("residual"), mask=mask)
    gradients = torch.autograd.grad(y, [*inputs.values(), *layer.parameters()], batch.dy)
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()
    assert (layer.running_var == 1).all()
    assert not layer.num_batches_skipped.any()
    if spec.dtype != torch.float16:  # its range is small
        assert y.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


@property_test(specs(masks=(None,)))
def test_inference_by_the_batchs_own_statistics_is_training(spec: Spec) -> None:
    """The output by given statistics; the oracle's are the given ones."""
    batch, results = expected(spec.batch(), [slice(0, spec.batch().samples)])
    n, mean, m2 = batch.moments()
    call = Call(batch.x, batch.weight, batch.bias, batch.residual, None, spec.eps, spec.channel_dim, spec.activation)
    y = normalize_by_running(call, torch.from_numpy(mean), torch.from_numpy(m2 / n))
    assert_within(y, *results["y"], "y")


@pytest.mark.parametrize("virtual_batch_size", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8])
def test_a_mask_of_any_dtype(dtype: torch.dtype, virtual_batch_size: int | None) -> None:
    """Tokenizers give int64, loaders uint8."""
    x, lengths = torch.randn(7, 3, 5), torch.tensor([5, 4, 5, 2, 1, 3, 5])
    mask = torch.arange(5) < lengths[:, None]
    spec = Spec(
        x.shape, 1, ("contiguous",) * 3, x.dtype, x.dtype, 0.0, None, False, torch.bool, (True, True), 0.5, 1e-5, 0
    )
    batch = Batch(**(vars(spec.batch()) | {"x": x, "mask": mask.to(dtype), "weights": mask.double().numpy()}))
    batch, results = expected(batch, cut(7, virtual_batch_size or 7))
    layer = layer_for(batch, spec, virtual_batch_size=virtual_batch_size)
    inputs = leaves(batch)
    compare(layer, inputs, layer(inputs["x"], mask=batch.mask), batch.dy, results)
    assert_running(layer, batch, 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["once", "create_graph", "torch.func", "masked ghosts"])
def test_half_gradients_are_rounded_once(path: str, dtype: torch.dtype) -> None:
    spec = Spec((64, 3, 5), 1, ("contiguous",) * 3, dtype, torch.float32, 0.0, None, False, None, None, 1, 1e-5, 0)
    ghosts = path == "masked ghosts"
    batch, results = expected(spec.batch(), cut(64, 16 if ghosts else 64))
    options: dict[str, Any] = {"mask": torch.ones(64, dtype=torch.bool), "virtual_batch_size": 16} if ghosts else {}

    def function(x: Tensor) -> Tensor:
        return batch_norm(x, None, None, batch.weight, batch.bias, True, **options)

    if path == "torch.func":
        (dx,) = torch.func.vjp(function, batch.x)[1](batch.dy)
    else:
        x = batch.x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(function(x), x, batch.dy, create_graph=path == "create_graph")
    assert_within(dx, *results["x"], "x")
