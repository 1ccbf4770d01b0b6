"""What every implementation of the operations has to give: the oracle's values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support import oracle, tolerances
from support.comparison import close
from support.samples import KINKS, Sample

EPS = 1e-5


def away_from_the_kinks(sample: Sample, dy: Tensor, z: oracle.Array) -> Tensor:
    """dy, but 0 where float32 cannot tell on which side of a kink z is: there the derivative jumps."""
    kinks = KINKS.get(sample.activation or "", ())
    unclear = torch.zeros(z.shape, dtype=torch.bool)
    for kink in kinks:
        unclear |= torch.from_numpy(np.abs(z - kink) < tolerances.OUTPUT * 8)
    return sample.layout.arrange(torch.where(unclear, 0, dy))


def assert_the_oracles(operations: Any, sample: Sample) -> None:
    """All operations but the commits on a sample; `operations` has them as attributes."""
    t = sample.tensors()
    o = sample.oracle_inputs(t)
    channel_dim, n = sample.layout.channel_dim, o["x"].size / sample.layout.channels
    options = (EPS, channel_dim, sample.activation)
    affine = (t["weight"], t["bias"], t["residual"], *options)
    arrays = (o["weight"], o["bias"], o["residual"], *options)
    y, mean, m2 = oracle.forward(o["x"], *arrays)
    var = m2 / n
    std = np.sqrt(var)
    statistics = (torch.from_numpy(mean), torch.from_numpy(var))

    for actual_y, actual_count, actual_mean, actual_m2 in [
        operations.forward(t["x"], *affine),
        (operations.normalize(t["x"], *statistics, *affine), *operations.batch_moments(t["x"], channel_dim)),
    ]:
        assert actual_y.dtype == sample.dtype
        close(actual_y, y, tolerances.NATIVE[sample.dtype], rounded=True)
        assert torch.equal(actual_count, torch.tensor(int(n)))
        close(actual_mean, mean, absolute=tolerances.STATISTIC * std)
        close(actual_m2, m2, relative=tolerances.STATISTIC)

    z = oracle.preactivation(o["x"], mean, var, *arrays[:4], channel_dim)
    t["dy"] = away_from_the_kinks(sample, t["dy"], z)
    o["dy"] = t["dy"].double().numpy()
    for constants in (False, True):
        dx, dz, dweight, dbias = oracle.backward(o["dy"], o["x"], mean, var, *arrays, constants=constants)
        sums = operations.backward_sums(t["dy"], t["x"], *statistics, *affine)
        means = (None, None) if constants else (sums[0] / n, sums[1] / n)
        results = [(*operations.backward_input(t["dy"], t["x"], *statistics, *affine, *means), *sums)]
        if not constants:
            moments = (torch.tensor(int(n)), torch.from_numpy(mean), torch.from_numpy(m2))
            fused = operations.backward(t["dy"], t["x"], *moments, *affine)
            results.append((fused[0], fused[3], fused[2], fused[1]))
            assert all(
                g.dtype == (torch.float64 if t is None else t.dtype)
                for g, t in zip(fused[1:3], affine[:2], strict=True)
            )
        for actual_dx, actual_dresidual, actual_dbias, actual_dweight in results:
            assert actual_dx.dtype == sample.dtype
            close(actual_dx, dx, tolerances.NATIVE[sample.dtype], rounded=True)
            close(actual_dbias, dbias, absolute=tolerances.SUM_PER_ROOT * n**0.5)
            close(actual_dweight, dweight, absolute=tolerances.SUM_PER_ROOT * n**0.5)
            if sample.with_residual and sample.activation is not None:
                assert actual_dresidual.dtype == sample.dtype
                close(actual_dresidual, dz, tolerances.NATIVE[sample.dtype], rounded=True)
            else:
                assert actual_dresidual.shape == (0,)


def masks(sample: Sample) -> dict[str, Tensor]:
    """Booleans, weights, and one sample left out, for the positions of a sample's input."""
    axis = sample.layout.channel_dim % len(sample.layout.shape)
    shape = tuple(size for dim, size in enumerate(sample.layout.shape) if dim != axis)
    generator = torch.Generator().manual_seed(3)
    # Of few positions all but one count: the variance of two values can be next to nothing, and y beyond measure.
    some = torch.rand(shape, generator=generator) > (0.4 if math.prod(shape) > 20 else 0)
    some.view(-1)[0] = False  # the first value of every channel does not count
    some.view(-1)[-1] = True
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) * some
    return {"bool": some, "float16": weights.half(), "float32": weights.float(), "float64": weights}


def assert_the_oracles_of_what_counts(operations: Any, sample: Sample, kind: str) -> None:
    """The same with one of `masks`."""
    t = sample.tensors()
    o = sample.oracle_inputs(t)
    mask = masks(sample)[kind]
    weights = mask.double().numpy()
    options = (EPS, sample.layout.channel_dim, sample.activation)
    affine, arrays = (tuple(v[key] for key in ("weight", "bias", "residual")) + options for v in (t, o))
    n, mean, m2 = oracle.moments(o["x"], options[1], weights)
    y, _, _ = oracle.forward(o["x"], *arrays, weights=weights)
    std = np.sqrt(m2 / n)
    z = oracle.preactivation(o["x"], mean, m2 / n, *arrays[:4], options[1])
    t["dy"] = away_from_the_kinks(sample, t["dy"], z)
    dx, dz, dweight, dbias = oracle.backward(t["dy"].double().numpy(), o["x"], mean, m2 / n, *arrays, weights=weights)

    actual_y, *moments = operations.forward(t["x"], *affine, mask)
    assert actual_y.dtype == sample.dtype
    close(actual_y, y, tolerances.NATIVE[sample.dtype], rounded=True)
    for count, actual_mean, actual_m2 in (moments, operations.batch_moments(t["x"], options[1], mask)):
        assert count.dtype == (torch.int64 if kind == "bool" else torch.float64)
        assert abs(count.item() - n) <= tolerances.STATISTIC * n
        close(actual_mean, mean, absolute=tolerances.STATISTIC * std)
        close(actual_m2, m2, relative=tolerances.STATISTIC)
    actual_dx, actual_dweight, actual_dbias, actual_dresidual = operations.backward(
        t["dy"], t["x"], *moments, *affine, mask
    )
    assert actual_dx.dtype == sample.dtype
    close(actual_dx, dx, tolerances.NATIVE[sample.dtype], rounded=True)
    root = (o["x"].size / sample.layout.channels) ** 0.5
    close(actual_dweight, dweight, absolute=tolerances.SUM_PER_ROOT * root)
    close(actual_dbias, dbias, absolute=tolerances.SUM_PER_ROOT * root)
    if sample.with_residual and sample.activation is not None:
        assert actual_dresidual.dtype == sample.dtype
        close(actual_dresidual, dz, tolerances.NATIVE[sample.dtype], rounded=True)


def masked_step(operations: Any, t: dict[str, Tensor], affine: tuple[object, ...], mask: Tensor | None) -> list[Tensor]:
    """All that both directions give."""
    y, *moments = operations.forward(t["x"], *affine, mask)
    return [y, *moments, *operations.backward(t["dy"], t["x"], *moments, *affine, mask)]


def assert_the_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
