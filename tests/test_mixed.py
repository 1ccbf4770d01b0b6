"""A batch of several domains in one pass: each domain's samples get what they would get alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import batchnorm as bn
from batchnorm import functional, mixed, ops
from batchnorm.call import Assignment, Call
from batchnorm.errors import CountError, OptionError, ShapeError
from batchnorm.kernels import reference
from batchnorm.statistics import BatchStatistics
from support import oracle, tolerances
from support.comparison import close
from support.samples import Layout

NAMES = ("first", "second", "third")
KINDS = [
    Layout("(N, C)", (9, 6)),
    Layout("(N, C) packed", (200, 5)),
    Layout("(N, C) whole vectors", (40, 64)),
    Layout("(N, C, L)", (9, 5, 7)),
    Layout("(N, L, C)", (9, 7, 24), -1),  # 7 rows of a sample: packed by 7
    Layout("(N, C, H, W)", (9, 5, 3, 4)),
    Layout("(N, C, H, W) channels_last", (9, 5, 4, 4), 1, "channels_last"),
    Layout("(N, C, H, W) permuted", (9, 5, 3, 4), 1, "permuted"),
    Layout("(N, C, H, W) with gaps", (9, 5, 3, 4), 1, "gaps"),
    Layout("(N, 1, L)", (9, 1, 3)),
]
BOTH = {"native": torch.ops.batchnorm, "reference": reference}


def assigned(samples: int, domains: int, seed: int = 0) -> Tensor:
    """At random, two samples of each domain at least."""
    some = torch.randint(domains, (samples,), generator=torch.Generator().manual_seed(seed))
    some[: 2 * domains] = torch.arange(domains).repeat(2)
    return some[torch.randperm(samples, generator=torch.Generator().manual_seed(seed + 1))]


def tensors(at: Layout, dtype: torch.dtype, domain: Tensor) -> dict[str, Tensor]:
    """Every domain somewhere else, so that moments of others would be far off."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shift = (domain * 5.0).view(-1, *[1] * (len(at.shape) - 1))
    drawn = {"x": draw(*at.shape) + shift, "residual": draw(*at.shape), "dy": draw(*at.shape)}
    return {name: at.arrange(values.to(dtype)) for name, values in drawn.items()}


def parameters(channels: int, domains: int, own: bool) -> tuple[Tensor, Tensor]:
    shape = (domains, channels) if own else (channels,)
    generator = torch.Generator().manual_seed(2)
    return torch.rand(shape, generator=generator) + 0.5, torch.randn(shape, generator=generator)


def row(table: Tensor, domain: int) -> np.ndarray:
    return (table[domain] if table.dim() == 2 else table).double().numpy()


@pytest.mark.parametrize("operations", BOTH)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("weighed", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operations_against_the_oracle(
    operations: str, kind: Layout, own: bool, weighed: torch.dtype | None, dtype: torch.dtype
) -> None:
    computed, domains, axis = BOTH[operations], 3, kind.channel_dim
    domain = assigned(kind.shape[0], domains)
    t = tensors(kind, dtype, domain)
    weight, bias = parameters(kind.channels, domains, own)
    positions = tuple(size for dim, size in enumerate(kind.shape) if dim != axis % len(kind.shape))
    drawn = torch.rand(positions, generator=torch.Generator().manual_seed(3))
    some = None if weighed is None else ((drawn > 0.2) * (1 + drawn)).to(weighed)
    if some is not None and len(positions) == 1:
        some = torch.ones_like(some)  # of few values, a variance may be next to nothing
    affine = (weight, bias, t["residual"], 1e-5, axis, "silu")

    y, count, mean, m2 = computed.forward(t["x"], *affine, some, domain, domains)
    moments = computed.batch_moments(t["x"], axis, some, domain, domains)
    dx, dweight, dbias, dresidual = computed.backward(t["dy"], t["x"], count, mean, m2, *affine, some, domain)
    var = reference.biased_variance(count, m2)
    sums = computed.backward_sums(t["dy"], t["x"], mean, var, *affine, some, domain)
    means = [total / count.unsqueeze(1) for total in sums]
    steps = computed.backward_input(t["dy"], t["x"], mean, var, *affine, *means, some, domain)
    again = computed.normalize(t["x"], mean, var, *affine, domain)

    dweights, dbiases = (torch.zeros(domains, kind.channels, dtype=torch.float64) for _ in range(2))
    for number in range(domains):
        own_ones = domain == number
        x, residual, dy = (t[name][own_ones].double().numpy() for name in ("x", "residual", "dy"))
        weights = None if some is None else some[own_ones].double().numpy()
        arrays = (row(weight, number), row(bias, number), residual, *affine[3:])
        n, *_ = oracle.moments(x, axis, weights)
        expected_y, expected_mean, expected_m2 = oracle.forward(x, *arrays, weights=weights)
        std = np.sqrt(expected_m2 / n)
        for found_count, found_mean, found_m2 in ((count, mean, m2), moments):
            close(found_count[number].double(), n, tolerances.STATISTIC)
            close(found_mean[number], expected_mean, absolute=tolerances.STATISTIC * std)
            close(found_m2[number], expected_m2, relative=tolerances.STATISTIC)
        expected = oracle.backward(dy, x, expected_mean, expected_m2 / n, *arrays, weights=weights)
        root = (x.size / kind.channels) ** 0.5
        for actual_y in (y, again):
            close(actual_y[own_ones], expected_y, tolerances.NATIVE[dtype], rounded=True)
        for actual_dx, actual_dresidual in ((dx, dresidual), steps):
            close(actual_dx[own_ones], expected[0], tolerances.NATIVE[dtype], rounded=True)
            close(actual_dresidual[own_ones], expected[1], tolerances.NATIVE[dtype], rounded=True)
        for actual, wanted in zip(sums, (expected[3], expected[2]), strict=True):
            close(actual[number], wanted, absolute=tolerances.SUM_PER_ROOT * root)
        dweights[number], dbiases[number] = (torch.from_numpy(g) for g in expected[2:])
    root = t["x"].numel() ** 0.5
    for actual, wanted in ((dweight, dweights), (dbias, dbiases)):
        expected_sum = (wanted if own else wanted.sum(0)).numpy()
        close(actual, expected_sum, absolute=tolerances.SUM_PER_ROOT * root, rounded=True)


def test_large_planes_are_walked_by_blocks_of_channels() -> None:
    """Beyond what a cache holds: another order of the same work."""
    x = torch.randn(4, 34, 256, 256, generator=torch.Generator().manual_seed(0))
    domain = torch.tensor([1, 0, 1, 0])
    x[domain == 1] += 7
    y, count, mean, m2 = ops.select(x).forward(x, None, None, None, 1e-5, 1, None, None, domain, 2)
    for number in range(2):
        expected_y, expected_count, expected_mean, expected_m2 = ops.select(x).forward(
            x[domain == number], None, None, None, 1e-5, 1, None
        )
        assert count[number] == expected_count
        close(mean[number], expected_mean, tolerances.ASSOCIATIVITY)
        close(m2[number], expected_m2, relative=tolerances.SCALED_SQUARES)
        close(y[domain == number], expected_y, tolerances.OUTPUT)


@pytest.mark.parametrize("shape", [(64, 24), (6, 24, 49), (6, 3, 1000)])
def test_the_same_bits_with_any_number_of_threads(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    domain = assigned(shape[0], 2)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.select(x).forward(x, None, None, None, 1e-5, 1, "relu", None, domain, 2))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[6]], ids=lambda kind: kind.name)
def test_what_is_not_finite_stays_in_its_domain(kind: Layout) -> None:
    domain = assigned(kind.shape[0], 2)
    x = tensors(kind, torch.float32, domain)["x"]
    alone = ops.select(x).forward(x, None, None, None, 1e-5, 1, None, None, domain, 2)
    x[(domain == 1).nonzero()[0, 0]] = float("inf")
    y, _, mean, m2 = ops.select(x).forward(x, None, None, None, 1e-5, 1, None, None, domain, 2)
    assert torch.equal(y[domain == 0], alone[0][domain == 0])
    assert torch.equal(mean[0], alone[2][0])
    assert torch.equal(m2[0], alone[3][0])
    assert not mean[1].isfinite().any()


# --- calls -----------------------------------------------------------------------------------------------------------


def assignment(domain: Tensor, domains: int) -> Assignment:
    return Assignment(domain, tuple(torch.bincount(domain, minlength=domains).tolist()))


def call(x: Tensor, domain: Tensor, domains: int = 3, **options: Any) -> Call:
    return Call(x, **{"assignment": assignment(domain, domains), **options})


@given(data=st.data())
def test_any_split_in_any_order_is_separate_passes(data: st.DataObject) -> None:
    domains = data.draw(st.integers(1, 4))
    samples = data.draw(st.integers(1, 12))
    domain = torch.tensor(data.draw(st.lists(st.integers(0, domains - 1), min_size=samples, max_size=samples)))
    shape = (samples, data.draw(st.integers(1, 20)), *data.draw(st.sampled_from([(2,), (3, 3), (17,)])))
    mode = data.draw(st.sampled_from([None, "relu", "gelu"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = (torch.randn(shape, generator=generator) + domain.view(-1, *[1] * (len(shape) - 1)) * 3).requires_grad_()
    dy = torch.randn(shape, generator=generator)
    names = NAMES[:1] * domains
    y, moments = mixed.normalize(call(x, domain, domains, activation=mode), BatchStatistics(), names)
    (dx,) = torch.autograd.grad(y, x, dy)
    for number in range(domains):
        ours = domain == number
        if not bool(ours.any()):
            assert moments.count[number] == 0
            assert bool((moments.mean[number] == 0).all() and (moments.m2[number] == 0).all())
            continue
        alone = x.detach()[ours].requires_grad_()
        own_y, own = functional.normalize(Call(alone, activation=mode), BatchStatistics())
        (own_dx,) = torch.autograd.grad(own_y, alone, dy[ours])
        scale = 1 / own.var().add(1e-5).sqrt().min().float()  # of two values that are next to each other
        close(y[ours].detach(), own_y.detach(), tolerances.OUTPUT * float(1 + scale))
        close(dx[ours], own_dx, tolerances.GRADIENT * float(1 + scale) ** 2)
        assert moments.count[number] == own.count
        close(moments.mean[number], own.mean, tolerances.ASSOCIATIVITY * 10)


def test_derivatives_of_every_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    domain = torch.tensor([0, 1, 1, 0, 0, 1, 1])
    x, residual = (torch.randn(7, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    for shape in ((2,), (2, 2)):
        weight, bias = (torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))

        def normalized(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            made = call(x, domain, 2, weight=weight, bias=bias, residual=residual, activation="silu")
            return mixed.normalize(made, BatchStatistics(), NAMES[:2])[0]

        inputs = (x, weight, bias, residual)
        assert torch.autograd.gradcheck(normalized, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(normalized, inputs)
        mean, var = (torch.rand(2, 2, dtype=torch.float64, generator=generator) + 0.5 for _ in range(2))

        def by_running(
            x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, mean: Tensor = mean, var: Tensor = var
        ) -> Tensor:
            made = call(x, domain, 2, weight=weight, bias=bias, residual=residual, activation="silu")
            return mixed.normalize_by_running(made, mean, var)

        assert torch.autograd.gradcheck(by_running, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(by_running, inputs)


def test_transforms_of_torch_func() -> None:
    domain = torch.tensor([0, 1, 1, 0])
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    one = lambda v: mixed.normalize(call(v, domain, 2), BatchStatistics(), NAMES[:2])[0]  # noqa: E731 - one expression
    close(torch.func.vmap(one)(x), torch.stack([one(v) for v in x]), tolerances.OUTPUT)


def test_channels_in_the_first_dimension() -> None:
    domain = assigned(6, 2)
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    residual = torch.ones_like(x)
    first = call(x, domain, 2, channel_dim=0, residual=residual, activation="relu")
    second = call(x.movedim(0, 1), domain, 2, residual=residual.movedim(0, 1), activation="relu")
    y, moments = mixed.normalize(first, BatchStatistics(), NAMES[:2])
    other, others = mixed.normalize(second, BatchStatistics(), NAMES[:2])
    assert torch.equal(y, other.movedim(1, 0))
    assert y.is_contiguous()
    for actual in (moments, mixed.batch_moments(first)):
        assert torch.equal(actual.mean, others.mean)
    by_running = mixed.normalize_by_running(first, others.mean, others.m2)
    assert torch.equal(by_running, mixed.normalize_by_running(second, others.mean, others.m2).movedim(1, 0))


def test_an_empty_batch_has_no_moments_in_any_domain() -> None:
    x = torch.zeros(0, 3, 2, requires_grad=True)
    empty = call(x, torch.zeros(0, dtype=torch.int64), 2)
    y, moments = mixed.normalize(empty, BatchStatistics(), NAMES[:2])
    assert y.shape == x.shape
    assert moments.count.tolist() == mixed.batch_moments(empty).count.tolist() == [0, 0]
    assert moments.mean.shape == (2, 3)
    assert mixed.normalize_by_running(empty, torch.zeros(2, 3), torch.ones(2, 3)).shape == x.shape


def test_one_value_names_the_domain() -> None:
    with pytest.raises(CountError, match=r"one value for each channel in domain 'second'"):
        mixed.normalize(call(torch.zeros(4, 3), torch.tensor([0, 1, 0, 0]), 2), BatchStatistics(), NAMES[:2])
    with pytest.raises(CountError, match=r"in ghost batches of 1 with one value for each channel in domain 'first'"):
        mixed.normalize(call(torch.zeros(4, 3), torch.tensor([0, 0, 0, 0]), 2), BatchStatistics(1), NAMES[:2])
    # one sample of several positions has as many values, and none has no domain to be wrong
    mixed.normalize(call(torch.randn(4, 3, 2), torch.tensor([0, 1, 0, 0]), 3), BatchStatistics(), NAMES)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 50])
def test_ghost_batches_are_those_of_the_domains_samples_alone(size: int, own: bool) -> None:
    domain = assigned(17, 2)
    x = torch.randn(17, 3, 4, generator=torch.Generator().manual_seed(0)) + domain.view(-1, 1, 1) * 5
    weight, bias = parameters(3, 2, own)
    y, moments = mixed.normalize(call(x, domain, 2, weight=weight, bias=bias), BatchStatistics(size), NAMES[:2])
    for number in range(2):
        alone = Call(x[domain == number], *(t[number] if own else t for t in (weight, bias)))
        own_y, own_moments = functional.normalize(alone, BatchStatistics(size))
        close(y[domain == number], own_y, tolerances.OUTPUT)
        assert moments.count[number] == own_moments.count
        close(moments.mean[number], own_moments.mean, tolerances.ASSOCIATIVITY)
        close(moments.m2[number], own_moments.m2, relative=tolerances.SCALED_SQUARES)


def test_what_does_not_fit_is_refused() -> None:
    domain = torch.tensor([0, 1])
    with pytest.raises(ShapeError, match=r"the domains of 2 samples for an input of shape \(3, 4\) with 3"):
        call(torch.zeros(3, 4), domain)
    with pytest.raises(ShapeError, match="weight"):
        call(torch.zeros(2, 4), domain, 2, weight=torch.ones(3, 4))
    with pytest.raises(OptionError, match="eps"):
        mixed.normalize(call(torch.zeros(2, 4), domain, 2, eps=0.0), BatchStatistics(), NAMES[:2])
    with pytest.raises(OptionError, match="eps"):
        mixed.normalize_by_running(call(torch.zeros(2, 4), domain, 2, eps=-1.0), torch.zeros(2, 4), torch.ones(2, 4))


NATIVE = pytest.mark.skipif(not ops.BACKENDS or ops.BACKENDS[0].devices != ("cpu",), reason="no native extension")


@NATIVE
@pytest.mark.parametrize(
    ("x", "domain", "number", "words"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 2]), 2, r"got domain 2 of sample 1"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), 2, r"got domain -1 of sample 1"),
        (torch.zeros(2, 3), torch.tensor([0]), 2, r"must be int64 of shape \(2,\)"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), 2, r"must be int64 of shape \(2,\)"),
        (torch.zeros(2, 3), torch.tensor([0, 0]), 0, r"got 0 domains"),
    ],
)
def test_the_native_operators_check_what_they_read(x: Tensor, domain: Tensor, number: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.batchnorm.forward(x, None, None, None, 1e-5, 1, None, None, domain, number)


@NATIVE
def test_the_native_operators_refuse_tables_that_do_not_fit() -> None:
    x, domain = torch.zeros(2, 3), torch.tensor([0, 1])
    table = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.batchnorm.normalize(x, table, table, torch.ones(3, 3), None, None, 1e-5, 1, None, domain)
    with pytest.raises(RuntimeError, match="samples must be there"):
        torch.ops.batchnorm.normalize(x.t(), table, table, None, None, None, 1e-5, 0, None, domain)
    with pytest.raises(RuntimeError, match="for domain 2"):
        torch.ops.batchnorm.commit(
            torch.zeros(3), torch.ones(3), None, None, torch.tensor([1, 1]), table, table, 0.1, 2
        )


def test_a_domains_moments_are_committed_alone() -> None:
    moments = (torch.tensor([4, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2))
    for operations in BOTH.values():
        for number, expected in ((0, [0.1, 0.2]), (1, [0.0, 0.0])):
            mean, var, tracked = torch.zeros(2), torch.ones(2), torch.tensor(0)
            operations.commit(mean, var, tracked, None, *moments, 0.1, number)
            close(mean, expected, tolerances.OUTPUT)
            assert tracked == (1 if number == 0 else 0)  # of nothing, no batch is counted


def test_a_layer_that_hands_its_moments_on() -> None:
    """What `deferred` collects is what a mixed pass commits."""
    layer = bn.BatchNorm1d(3, domains=("a", "b"))
    x, domain = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 0, 0])
    with bn.deferred(layer) as pending:
        with bn.domain(layer, domain):
            layer(x)
        found = [pending.moments(layer, name) for name in ("a", "b")]
    for number, moments in enumerate(found):
        assert moments is not None
        close(moments.mean, x[domain == number].double().mean(0), tolerances.STATISTIC)
