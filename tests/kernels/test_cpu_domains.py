"""Short samples of several domains, which the native kernels bring together: the oracle's values at every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from support import oracle, tolerances
from support.comparison import close
from support.operations import assert_the_same_bits
from support.samples import Layout

native = torch.ops.batchnorm

KINDS = [
    Layout("(N, C) in several parts", (45_000, 3)),
    Layout("(N, C) larger than what is kept", (200_000, 3)),
    Layout("(N, C) one channel", (3000, 1)),
    Layout("(N, C) whole vectors", (2000, 16)),
    Layout("(N, C) the longest", (1500, 32)),
    Layout("(N, C) longer, together for sums alone", (700, 272)),
    Layout("(N, C) longer, in rows that are packed", (700, 100)),
    Layout("(N, L, C) of few rows", (300, 5, 48), -1),
    Layout("(N, C, L)", (1200, 4, 5)),
    Layout("(N, L, C)", (1200, 3, 7), -1),
    Layout("(N, C, H, W) channels_last", (700, 3, 2, 3), 1, "channels_last"),
]


def orders(samples: int, domains: int) -> dict[str, Tensor]:
    """Domains of samples: at random, sorted, and sorted but for a few."""
    at_random = torch.randint(domains, (samples,), generator=torch.Generator().manual_seed(samples))
    at_random[: 2 * domains] = torch.arange(domains).repeat(2)
    in_order = at_random.sort().values
    mixed = in_order.clone()
    mixed[:: samples // 7] = domains - 1
    return {"random": at_random, "sorted": in_order, "nearly": mixed}


def tensors(kind: Layout, dtype: torch.dtype, domain: Tensor) -> dict[str, Tensor]:
    """Every domain somewhere else, so that moments of others would be far off."""
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(kind.shape, generator=generator) for name in ("x", "residual", "dy")}
    drawn["x"] += (domain * 5.0).view(-1, *[1] * (len(kind.shape) - 1))
    return {name: kind.arrange(values.to(dtype)) for name, values in drawn.items()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("order", ["random", "sorted", "nearly"])
@pytest.mark.parametrize(("dtype", "domains", "masked"), [(torch.float32, 2, False), (torch.bfloat16, 6, True)])
def test_each_domain_is_a_batch_of_its_own(
    kind: Layout, order: str, dtype: torch.dtype, domains: int, masked: bool, level: str
) -> None:
    axis, domain = kind.channel_dim, orders(kind.shape[0], domains)[order]
    t = tensors(kind, dtype, domain)
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.rand(domains, kind.channels, generator=generator) + 0.5 for _ in range(2))
    positions = tuple(size for dim, size in enumerate(kind.shape) if dim != axis % len(kind.shape))
    mask = torch.rand(positions, generator=generator) + 0.5 if masked else None
    affine = (weight, bias, t["residual"], 1e-5, axis, "silu")

    y, count, mean, m2 = native.forward(t["x"], *affine, mask, domain, domains)
    dx, dweight, dbias, dresidual = native.backward(t["dy"], t["x"], count, mean, m2, *affine, mask, domain)
    for number in range(domains):
        own = domain == number
        x, residual, dy = (t[name][own].double().numpy() for name in ("x", "residual", "dy"))
        weights = None if mask is None else mask[own].double().numpy()
        arrays = (weight[number].double().numpy(), bias[number].double().numpy(), residual, *affine[3:])
        n, *_ = oracle.moments(x, axis, weights)
        expected_y, expected_mean, expected_m2 = oracle.forward(x, *arrays, weights=weights)
        close(count[number].double(), n, tolerances.STATISTIC)
        close(mean[number], expected_mean, absolute=tolerances.STATISTIC * np.sqrt(expected_m2 / n))
        close(m2[number], expected_m2, relative=tolerances.STATISTIC)
        close(y[own], expected_y, tolerances.NATIVE[dtype], rounded=True)
        expected = oracle.backward(dy, x, expected_mean, expected_m2 / n, *arrays, weights=weights)
        close(dx[own], expected[0], tolerances.NATIVE[dtype], rounded=True)
        close(dresidual[own], expected[1], tolerances.NATIVE[dtype], rounded=True)
        root = (x.size / kind.channels) ** 0.5
        for actual, wanted in ((dweight, expected[2]), (dbias, expected[3])):
            close(actual[number], wanted, absolute=tolerances.SUM_PER_ROOT * root, rounded=True)


def step(x: Tensor, domain: Tensor, domains: int, channel_dim: int = 1) -> list[Tensor]:
    """What a training step computes."""
    affine = (None, None, None, 1e-5, channel_dim, "relu")
    y, *moments = native.forward(x, *affine, None, domain, domains)
    return [y, *moments, *native.backward(y, x, *moments, *affine, None, domain)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS[:2], *KINDS[5:9]], ids=lambda kind: kind.name)
def test_the_same_bits_with_any_number_of_threads(kind: Layout, dtype: torch.dtype, threads: None) -> None:
    x = kind.arrange(torch.randn(kind.shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    domain = orders(kind.shape[0], 3)["random"]
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(step(x, domain, 3, kind.channel_dim))
    for other in found[1:]:
        assert_the_same_bits(found[0], other)


def test_the_order_of_other_domains_is_not_used_again() -> None:
    x = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    first = orders(3000, 2)["random"]
    second = first.flip(0)
    alone = [[t.clone() for t in step(x, domain, 2)] for domain in (first, second)]
    changed = first.clone()
    assert_the_same_bits(step(x, changed, 2), alone[0])
    changed.copy_(second)  # the same memory
    assert_the_same_bits(step(x, changed, 2), alone[1])
    with pytest.raises(RuntimeError, match=r"got domain 2 of sample 7; it must lie in \[0, 1\]"):
        step(x, second.index_fill(0, torch.tensor([7]), 2), 2)
    assert_the_same_bits(step(x, first, 2), alone[0])
    for name, domain in (("first", first), ("second", second)):
        mean = torch.stack([x[domain == number].double().mean(0) for number in range(2)])
        close(step(x, domain, 2)[2], mean, tolerances.STATISTIC, name=name)
