"""Ghost batches: how a batch is cut, and that each is normalised as torch normalises it alone."""

from __future__ import annotations

import collections
import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from batchnorm import errors, ghost
from batchnorm.functional import batch_norm
from support import oracle, tolerances
from support.comparison import close
from support.samples import Layout

# Layouts of n samples.
KINDS: dict[str, tuple[tuple[int, ...], int, str]] = {
    "(N, C)": ((0, 6), 1, "contiguous"),
    "(N, C, L)": ((0, 5, 7), 1, "contiguous"),
    "(N, L, C)": ((0, 7, 5), -1, "contiguous"),
    "(C, N)": ((6, 0), 0, "contiguous"),
    "(C, N, L)": ((2, 0, 3), 0, "contiguous"),  # fewer channels than samples in a ghost batch
    "(N, C, H, W)": ((0, 5, 3, 4), 1, "contiguous"),
    "(N, C, H, W) channels_last": ((0, 5, 3, 4), 1, "channels_last"),
    "(N, C, H, W) with gaps": ((0, 5, 3, 4), 1, "gaps"),
    "(N, 1, L)": ((0, 1, 3), 1, "contiguous"),
}
# Remainders of 0, 1, 2 and 3 samples; a single one that joins the only ghost batch, and the last of many.
CUTS = [(9, 3), (9, 4), (11, 3), (11, 4), (7, 6), (13, 2)]


def layout(kind: str, samples: int) -> Layout:
    shape, channel_dim, memory = KINDS[kind]
    return Layout(kind, tuple(size or samples for size in shape), channel_dim, memory)


def batches(samples: int, size: int) -> list[slice]:
    """The rule in words: every `size` samples; a single one that is left over joins the last."""
    ends = [*range(size, samples, size), samples]
    if samples % size == 1 and len(ends) > 1:
        del ends[-2]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def leaves(at: Layout, dtype: torch.dtype, affine: bool = True) -> dict[str, Tensor]:
    """Every argument that has a gradient. Neighbours differ, so that no ghost batch has a variance near 0."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    samples = 1 if at.channel_dim == 0 else 0
    alternating = (torch.arange(at.shape[samples]) % 2 * 4).view(
        *[1] * samples, -1, *[1] * (len(at.shape) - samples - 1)
    )
    found = {"input": at.arrange(draw(*at.shape) + alternating.to(dtype) + 3)}
    if affine:
        found["residual"] = at.arrange(draw(*at.shape))
        found |= {"weight": draw(at.channels).abs() + 0.5, "bias": draw(at.channels)}
    return {name: leaf.detach().requires_grad_() for name, leaf in found.items()}


def gradients(y: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    dy = (torch.arange(y.numel()) % 17 / 8 - 1).to(y.dtype).view(y.shape)
    return dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))


def one_by_one(
    size: int,
    channel_dim: int,
    activation: str | None,
    *,
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """torch's batch norm of each ghost batch alone."""
    x = input.movedim(channel_dim, 1)
    parts = [F.batch_norm(x[at], None, None, weight, bias, training=True) for at in batches(len(x), size)]
    y = torch.cat(parts).movedim(1, channel_dim)
    if residual is not None:
        y = y + residual
    return y if activation is None else getattr(F, activation)(y)


# --- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 21))
def test_every_sample_is_in_one_ghost_batch(size: int) -> None:
    for samples in range(1, 21):
        runs = ghost.parts(samples, size)
        assert len(runs) <= 2
        covered = 0
        for first, ghosts, each in runs:
            assert first == covered
            covered += ghosts * each
        assert covered == samples
        sizes = [each for _, ghosts, each in runs for _ in range(ghosts)]
        if samples < size:
            assert sizes == [samples]
            continue
        rest = samples % size
        assert set(sizes[:-1]) <= {size}
        assert sizes[-1] == {0: size, 1: size + 1}.get(rest, rest)
        assert sizes == [at.stop - at.start for at in batches(samples, size)]


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3), (12, 5, 2, 3), (12, 1, 3)])
@pytest.mark.parametrize("ghosts", [1, 3, 12])
def test_ghost_batches_become_channels_and_back(shape: tuple[int, ...], ghosts: int) -> None:
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    wide = ghost.widen(x, ghosts)
    each = 12 // ghosts
    assert wide.shape == (each, ghosts * shape[1], *shape[2:])
    for i in range(ghosts):
        assert torch.equal(wide[:, i * shape[1] : (i + 1) * shape[1]], x[i * each : (i + 1) * each])
    assert torch.equal(ghost.narrow(wide, ghosts), x)
    mask = x[:, 0]
    weights = ghost.widen_mask(mask, ghosts, shape[1])
    assert torch.equal(weights, ghost.widen(mask.unsqueeze(1).expand(shape).clone(), ghosts))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("affine", "activation"), [(False, None), (True, None), (True, "silu")])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_normalised_alone(
    kind: str, cut: tuple[int, int], affine: bool, activation: str | None, dtype: torch.dtype
) -> None:
    at, size = layout(kind, cut[0]), cut[1]
    inputs = leaves(at, dtype, affine)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.items()}
    options: dict[str, Any] = {"channel_dim": at.channel_dim, "activation": activation}
    y = batch_norm(**inputs, running_mean=None, running_var=None, training=True, virtual_batch_size=size, **options)
    expected = one_by_one(size, **options, **exact)
    close(y, expected.detach().numpy())
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(inputs["input"]).stride()
    wanted = gradients(expected, exact)
    for name, gradient in gradients(y, inputs).items():
        close(gradient, wanted[name].numpy())


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_running_statistics_see_all_samples(kind: str, cut: tuple[int, int]) -> None:
    at, size = layout(kind, cut[0]), cut[1]
    x = leaves(at, torch.float32)["input"].detach()
    mean, var = torch.full((at.channels,), 2.0), torch.full((at.channels,), 3.0)
    before = (mean.double().numpy(), var.double().numpy())
    batch_norm(x, mean, var, training=True, momentum=0.3, channel_dim=at.channel_dim, virtual_batch_size=size)
    expected = oracle.commit(before, *oracle.moments(x.double().numpy(), at.channel_dim), 0.3)
    for actual, wanted in zip((mean, var), expected, strict=True):
        close(actual, wanted, tolerances.STATISTIC)


def masks(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Masks that leave something of every three samples, different in each."""
    samples = torch.arange(shape[0])
    positions = torch.arange(torch.Size(shape).numel()).view(shape)
    return {
        "samples": samples % 3 != 1,
        "positions": positions % 5 != 2,
        "weights": (positions * 7 % 4).float() / 2,
        "weights of samples": (samples % 4 + 1).double(),
    }


@pytest.mark.parametrize("mask", masks((1, 1)))
@pytest.mark.parametrize("cut", [(8, 4), (9, 4), (11, 4), (11, 3), (9, 12)], ids=str)
@pytest.mark.parametrize("kind", ["(N, C, L)", "(N, L, C)", "(N, C, H, W) channels_last", "(C, N, L)", "(N, 1, L)"])
def test_a_mask_counts_inside_each(kind: str, cut: tuple[int, int], mask: str) -> None:
    at, size = layout(kind, cut[0]), cut[1]
    axis = at.channel_dim % len(at.shape)
    inputs = leaves(at, torch.float64)
    given = masks(at.shape[:axis] + at.shape[axis + 1 :])[mask]
    mean, var = torch.zeros(at.channels), torch.ones(at.channels)
    y = batch_norm(
        **inputs,
        running_mean=mean,
        running_var=var,
        training=True,
        channel_dim=at.channel_dim,
        mask=given,
        virtual_batch_size=size,
        activation="silu",
    )
    actual = {"y": y.detach(), **gradients(y, inputs)}

    # The oracle, ghost batch after ghost batch, with the samples first.
    first = {n: t.detach().movedim(at.channel_dim, 1).numpy() for n, t in inputs.items() if t.dim() > 1}
    dy = (torch.arange(y.numel()) % 17 / 8 - 1).double().view(y.shape).movedim(at.channel_dim, 1).numpy()
    x, residual, weight, bias = (
        first["input"],
        first["residual"],
        *(inputs[n].detach().numpy() for n in ("weight", "bias")),
    )
    weights = given.double().view(-1, *[1] * (x.ndim - 1 - given.dim()), *given.shape[1:]).numpy()
    weights = np.broadcast_to(weights, (x.shape[0], *x.shape[2:]))
    found = collections.defaultdict(list)
    for part in batches(len(x), size):
        arrays = (weight, bias, residual[part])
        output, m, m2 = oracle.forward(x[part], *arrays, activation="silu", weights=weights[part])
        v = m2 / weights[part].sum()
        dx, dz, dweight, dbias = oracle.backward(
            dy[part], x[part], m, v, *arrays, activation="silu", weights=weights[part]
        )
        for name, value in {"y": output, "input": dx, "residual": dz, "weight": dweight, "bias": dbias}.items():
            found[name].append(value)
    for name, values in found.items():
        per_channel = name in ("weight", "bias")
        expected = sum(values) if per_channel else np.moveaxis(np.concatenate(values), 1, at.channel_dim)
        close(actual[name], expected)
    running = oracle.commit((np.zeros(at.channels), np.ones(at.channels)), *oracle.moments(x, 1, weights), 0.1)
    for statistic, wanted in zip((mean, var), running, strict=True):
        close(statistic, wanted, tolerances.STATISTIC)


def test_ghost_batches_of_one_sample_are_instance_normalization() -> None:
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    close(batch_norm(x, None, None, training=True, virtual_batch_size=1), F.instance_norm(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    # Drawn from a seed: where a value is the mean but for float64's rounding, there is no relative error to compare.
    x = (torch.randn(11, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1).to(dtype)
    y = batch_norm(x, None, None, training=True, virtual_batch_size=4)
    assert y.dtype == dtype
    expected = one_by_one(4, 1, None, input=x.double())
    relative, absolute = tolerances.ONE_ROUNDING[dtype]
    close(y, expected.to(dtype), relative=2 * relative, absolute=absolute)


def test_a_second_derivative() -> None:
    x = leaves(layout("(N, C, L)", 7), torch.float64)["input"]
    assert torch.autograd.gradgradcheck(lambda v: batch_norm(v, None, None, training=True, virtual_batch_size=3), x)


# --- when there are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [9, 10, 1000])
def test_a_batch_that_is_no_larger_is_one(size: int) -> None:
    x = torch.randn(9, 4, 3, dtype=torch.float64)
    mine, theirs = ([torch.zeros(4), torch.ones(4)] for _ in range(2))
    close(
        batch_norm(x, *mine, training=True, virtual_batch_size=size),
        F.batch_norm(x, *[t.double() for t in theirs], training=True),
    )
    F.batch_norm(x.float(), *theirs, training=True)
    for actual, expected in zip(mine, theirs, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("samples", [1, 9])
def test_inference_knows_none(samples: int) -> None:
    x, mean, var = torch.randn(samples, 4), torch.randn(4), torch.rand(4) + 0.5
    expected = F.batch_norm(x.double(), mean.double(), var.double()).numpy()
    close(batch_norm(x, mean, var, virtual_batch_size=1), expected)
    layer = bn.BatchNorm1d(4, virtual_batch_size=1)
    layer.running_mean.copy_(mean), layer.running_var.copy_(var)
    close(layer.eval()(x), expected)
    assert torch.equal(layer.running_mean, mean)


def test_empty_batches() -> None:
    layer = bn.BatchNorm1d(4, virtual_batch_size=2)
    assert layer(torch.zeros(0, 4)).shape == (0, 4)
    assert layer.num_batches_tracked == 0


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", ["(N, C)", "(N, L, C)", "(N, C, H, W) channels_last"])
def test_a_layer(kind: str, cut: tuple[int, int]) -> None:
    at, size = layout(kind, cut[0]), cut[1]
    options: dict[str, Any] = {"channel_dim": at.channel_dim, "activation": "silu"}
    layer = bn.BatchNorm(at.channels, virtual_batch_size=size, dtype=torch.float64, **options)
    whole = torch.nn.BatchNorm1d(at.channels, dtype=torch.float64)
    inputs = leaves(at, torch.float64)
    with torch.no_grad():
        layer.weight.copy_(inputs["weight"]), layer.bias.copy_(inputs["bias"])
    for step in (1, 2):
        x = inputs["input"].detach() * step
        y = layer(x, residual=inputs["residual"])
        close(y, one_by_one(size, **options, **(inputs | {"input": x})))
        whole(x.movedim(at.channel_dim, -1).reshape(-1, at.channels))
        assert layer.num_batches_tracked == step
    close(layer.running_mean, whole.running_mean)
    close(layer.running_var, whole.running_var)
    assert f"virtual_batch_size={size}" in repr(layer)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_is_positive(size: int) -> None:
    with pytest.raises(errors.OptionError, match=f"got virtual_batch_size={size}"):
        bn.BatchNorm1d(4, virtual_batch_size=size)
    with pytest.raises(errors.OptionError, match=f"got virtual_batch_size={size}"):
        batch_norm(torch.randn(6, 4), None, None, training=True, virtual_batch_size=size)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1)])
def test_one_value_for_each_channel_of_a_ghost_batch(shape: tuple[int, ...]) -> None:
    layer = bn.BatchNorm(4, virtual_batch_size=1)
    with pytest.raises(errors.CountError, match=r"BatchNorm\(4\): .* in ghost batches of 1: one value .* larger batch"):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0
    assert layer.running_mean.tolist() == [0] * 4


# --- the number of operations ----------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls(samples: int, size: int, mask: Tensor | None = None) -> Calls:
    x = torch.randn(samples, 3, 5, requires_grad=True)
    with Calls() as counted:
        batch_norm(x, None, None, training=True, virtual_batch_size=size, mask=mask).sum().backward()
    return counted


@pytest.mark.parametrize(("rest", "forwards"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_the_operations_do_not_grow_with_the_ghost_batches(rest: int, forwards: int) -> None:
    few, many = calls(4 * 4 + rest, 4), calls(64 * 4 + rest, 4)
    assert many.count["batchnorm.forward.default"] == forwards
    assert many.count["batchnorm.backward.default"] == forwards
    assert many.count == few.count
    assert calls(64 * 4 + rest, 4, torch.ones(64 * 4 + rest)).count == calls(16 + rest, 4, torch.ones(16 + rest)).count


@pytest.mark.parametrize(
    ("dynamic", "backend", "sizes"),
    [(False, "aot_eager", (6,)), (True, "eager", (6, 9))],  # aot_eager takes 20 s to prove things about symbols
    ids=["fixed", "any size"],
)
def test_compiled_in_one_graph_with_a_mask(dynamic: bool, backend: str, sizes: tuple[int, ...]) -> None:
    torch.compiler.reset()
    layer = bn.BatchNorm1d(3, virtual_batch_size=2, activation="silu")
    expected = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for samples in sizes:
        x, mask = torch.randn(samples, 3, requires_grad=True), torch.arange(samples) % 3 != 2
        y, wanted = compiled(x, mask=mask), expected(x, mask=mask)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(output.pow(3).sum(), x)[0] for output in (y, wanted)))
    torch.testing.assert_close(layer.running_var, expected.running_var)
