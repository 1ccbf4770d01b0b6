"""Random batches of every rank, layout, dtype and mask, and what the oracle makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from support import oracle, tolerances
from support.comparison import close
from support.oracle import Array
from support.samples import ACTIVATIONS, KINKS

HALVES = (torch.float16, torch.bfloat16)
Bounded = dict[str, tuple[Array, Array]]  # from a result's name to its value and by how much it may be off


@dataclass(frozen=True)
class Batch:
    """What a layer is given, and the mask as the oracle takes it: float64 weights of the observed shape."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    mask: Tensor | None
    weight: Tensor
    bias: Tensor
    weights: Array | None
    axis: int
    eps: float
    activation: str | None

    @property
    def samples(self) -> int:
        return self.x.shape[self.sample_axis]

    @property
    def sample_axis(self) -> int:
        return 1 if self.axis == 0 else 0

    def part(self, t: Tensor | None, group: slice) -> Tensor | None:
        """The samples of a group: of x, dy, residual."""
        return None if t is None else t.narrow(self.sample_axis, group.start, group.stop - group.start)

    def mask_of(self, group: slice) -> Tensor | None:
        return self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[group]

    def moments(self) -> tuple[float, Array, Array]:
        return oracle.moments(self.x.double().numpy(), self.axis, self.weights)


@dataclass(frozen=True)
class Spec:
    """Everything that says what a batch is, short enough to read where a test fails."""

    shape: tuple[int, ...]
    channel_dim: int
    memory: tuple[str, str, str]  # of x, dy and the residual
    dtype: torch.dtype
    parameters: torch.dtype
    offset: float
    activation: str | None
    residual: bool
    mask: torch.dtype | None
    mask_sizes: tuple[bool, ...] | None  # which observed dimensions the mask has; None for one value for each sample
    share: float  # of the mask that counts
    eps: float
    seed: int

    def batch(self) -> Batch:
        generator = torch.Generator().manual_seed(self.seed)
        axis = self.channel_dim % len(self.shape)
        observed = tuple(size for dim, size in enumerate(self.shape) if dim != axis)
        channels = self.shape[axis]

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def arranged(memory: str, offset: float = 0.0) -> Tensor:
            return arrange((draw(*self.shape) + offset).to(self.dtype), memory, axis)

        x, dy, residual = arranged(self.memory[0], self.offset), arranged(self.memory[1]), arranged(self.memory[2])
        weight, bias = ((draw(channels).abs() + 0.5).to(self.parameters), draw(channels).to(self.parameters))
        mask = weights = None
        if self.mask is not None:
            full = self.mask_sizes or (True,) + (False,) * (len(observed) - 1)
            sizes = [size if kept else 1 for size, kept in zip(observed, full, strict=True)]
            wide = torch.rand(sizes, generator=generator) * 2 * (torch.rand(sizes, generator=generator) < self.share)
            mask = wide.to(self.mask)
            weights = np.ascontiguousarray(np.broadcast_to(mask.double().numpy(), observed))
            mask = mask.view(-1) if self.mask_sizes is None else mask
        return Batch(
            x, dy, residual if self.residual else None, mask, weight, bias, weights, axis, self.eps, self.activation
        )


def arrange(values: Tensor, memory: str, axis: int) -> Tensor:
    """The values in a memory order."""
    dims = list(range(values.dim()))
    match memory:
        case "contiguous":
            order = dims
        case "channels_last":
            order = [dim for dim in dims if dim != axis] + [axis]
        case "reversed":
            order = dims[::-1]
        case "gaps":
            return values.repeat_interleave(2, dim=-1)[..., ::2]
        case "expanded":
            return values.narrow(-1, 0, 1).expand_as(values)
        case _:
            raise AssertionError(memory)
    return values.permute(order).contiguous().permute([order.index(dim) for dim in dims])


MEMORY = st.sampled_from(["contiguous", "channels_last", "reversed", "gaps", "expanded"])


@st.composite
def specs(draw: st.DrawFn, samples: int | None = None, masks: tuple[torch.dtype | None, ...] | None = None) -> Spec:
    """Small batches with at least two samples; of float32 most often."""
    rank = draw(st.integers(2, 5))
    channel_dim = draw(st.sampled_from([1, 1, -1, 0]))
    shape = [draw(st.integers(2, 9)) if samples is None else samples]
    shape += draw(st.lists(st.integers(1, 5), min_size=rank - 2, max_size=rank - 2))
    shape.insert(channel_dim % rank, draw(st.one_of(st.integers(1, 6), st.sampled_from([17, 33]))))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, *HALVES]))
    every = (None, None, torch.bool, torch.bool, torch.float32, torch.float64, torch.bfloat16)
    sizes = st.one_of(st.none(), st.lists(st.booleans(), min_size=rank - 1, max_size=rank - 1).map(tuple))
    return Spec(
        tuple(shape),
        channel_dim,
        (draw(MEMORY), draw(MEMORY), draw(MEMORY)),
        dtype,
        parameters=dtype if dtype == torch.float64 else draw(st.sampled_from([torch.float32, dtype])),
        offset=draw(st.sampled_from([0.0, 3.0] if dtype in HALVES else [0.0, 3.0, -300.0])),
        activation=draw(st.sampled_from([None, *ACTIVATIONS])),
        residual=draw(st.booleans()),
        mask=draw(st.sampled_from(every if masks is None else masks)),
        mask_sizes=draw(st.one_of(st.just((True,) * (rank - 1)), sizes)),
        share=draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def expected(batch: Batch, groups: list[slice]) -> tuple[Batch, Bounded]:
    """Training by the oracle, where each group of samples is normalised by its own statistics.

    Returns:
        The batch with dy 0 where an activation has a kink within rounding, and the results: y, x (its gradient),
        residual, weight and bias.
    """
    x, dy, weight, bias = (t.double().numpy() for t in (batch.x, batch.dy.clone(), batch.weight, batch.bias))
    residual = None if batch.residual is None else batch.residual.double().numpy()
    parts: list[Bounded] = []
    for group in groups:
        index = tuple(group if dim == batch.sample_axis else slice(None) for dim in range(x.ndim))
        w = None if batch.weights is None else batch.weights[group]
        r = None if residual is None else residual[index]
        parts.append(_one_group(batch, x[index], dy[index], r, weight, bias, w))
    clear = torch.from_numpy(np.concatenate([part.pop("clear")[0] for part in parts], batch.sample_axis))
    results: Bounded = {}
    for name in parts[0]:
        values, bounds = zip(*(part[name] for part in parts), strict=True)
        if name in ("weight", "bias"):  # each group's is rounded, and so is each sum on the way to all of them
            relative, absolute = tolerances.ONE_ROUNDING[batch.weight.dtype]
            roundings = len(groups) * sum(relative * abs(value) + absolute for value in values)
            results[name] = sum(values), sum(bounds) + (roundings if len(groups) > 1 else 0)
        else:
            results[name] = np.concatenate(values, batch.sample_axis), np.concatenate(bounds, batch.sample_axis)
    return Batch(**(vars(batch) | {"dy": batch.dy * clear})), results


def _one_group(
    batch: Batch, x: Array, dy: Array, residual: Array | None, weight: Array, bias: Array, weights: Array | None
) -> Bounded:
    """Values and, from the sizes of the terms that they are made of, how much rounding may move them."""
    axis, unit = batch.axis, tolerances.NATIVE[batch.x.dtype]
    n, mean, m2 = oracle.moments(x, axis, weights)
    var = m2 / (n or 1)
    arrays = (weight, bias, residual, batch.eps, axis)
    z = oracle.preactivation(x, mean, var, *arrays)

    spread = [1] * x.ndim
    spread[axis] = -1
    dims = tuple(dim for dim in range(x.ndim) if dim != axis)
    std, gamma = np.sqrt(var + batch.eps).reshape(spread), abs(weight).reshape(spread)
    # A value and its mean are rounded before they are subtracted, in float64.
    x_hat = abs(x - mean.reshape(spread)) / std + 8 * 2.0**-53 * abs(x).max(initial=0) / std / unit
    size = 1 + x_hat * gamma + abs(bias).reshape(spread) + (0 if residual is None else abs(residual))
    clear = np.ones(x.shape, dtype=bool)
    for kink in KINKS.get(batch.activation or "", ()):
        clear &= abs(z - kink) > 8 * unit * size
    dy = dy * clear

    with np.errstate(over="ignore"):  # exp of what a variance of 0 makes large; what becomes of it is finite
        y = oracle.activate(z, batch.activation)
        dx, dz, dweight, dbias = oracle.backward(dy, x, mean, var, *arrays, batch.activation, weights=weights)
    d = abs(dy) * size * (1 if batch.activation is None else 2)  # an activation's slope moves with its argument
    w = np.ones_like(x) if weights is None else np.expand_dims(weights, axis)
    through = (gamma * d).sum(dims, keepdims=True) + x_hat * (gamma * d * x_hat).sum(dims, keepdims=True)
    results = {
        "y": (y, unit * size),
        "x": (dx, unit * (gamma * d + w * through / (n or 1)) / std),
        "residual": (dz, unit * d),
        "weight": (dweight, unit * (d * (1 + x_hat)).sum(dims)),
        "bias": (dbias, unit * d.sum(dims)),
    }
    return results | {"clear": (clear, clear)}


def assert_within(actual: Tensor, value: Array, bound: Array, name: str) -> None:
    """`actual` is `value` within a bound and the rounding to its dtype; beyond that dtype's range anything goes."""
    beyond = abs(value) + bound > torch.finfo(actual.dtype).max * 0.99
    inside = actual.detach().masked_fill(torch.from_numpy(beyond), 0)
    close(inside, np.where(beyond, 0, value), absolute=bound, rounded=True, name=name)


def assert_running(layer: torch.nn.Module, batch: Batch, factor: float) -> None:
    """Running statistics that began at 0 and 1, after one commit of all of the batch; counters too."""
    n, mean, m2 = batch.moments()
    c = len(mean)
    old = np.zeros(c), np.ones(c)
    running = oracle.commit(old, n, mean, m2, factor) if n > 1 else old
    std = np.sqrt(m2 / (n or 1)) + math.sqrt(batch.eps)
    assert_within(layer.running_mean, running[0], tolerances.STATISTIC * std, "running_mean")
    assert_within(layer.running_var, running[1], tolerances.STATISTIC * running[1], "running_var")
    assert layer.num_batches_tracked == (n > 0)
    assert layer.num_batches_skipped.tolist() == [int(0 < n <= 1)] * c
