"""BN304 to BN308: what data show of the values that come into layers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.graph import graph
from batchnorm.diagnosis.noise import BEYOND_NOISE, difference, rms, share_of_samples
from batchnorm.diagnosis.observation import ObservedLayer
from batchnorm.diagnosis.subject import LayerState, Subject
from batchnorm.models.norm_layers import display_name
from batchnorm.report.document import Table

ROWS = 8  # of a table of evidence

# A channel whose SD is below a thousandth of its mean and of sqrt(eps) is a constant: eps alone sets its scale.
CONSTANT = 1e-3
# sqrt(var + eps) of a constant channel gives 316 with torch's eps and a gamma of 1. A scale of a tenth of that turns
# rounding in float32 into 2e-6 of the values, and what comes in one day into no more than other channels know.
LARGE_SCALE = 30.0
# With a tenth of the positions, the mean moves by a tenth of the distance to the padding's values.
PADDED = 0.1
# Chance runs of equal positions at the ends are a large part of very short samples only; and of one channel, silence.
SHORTEST, FEWEST_CHANNELS = 8, 2
# Beyond this, samples are constant all along: no padding.
ALL_ALIKE = 0.95
# Below, float32 and bfloat16 lose nothing that counts: their layers add up in float32 or better.
FAR_MEAN = 100.0
# In standard deviations of the output, rms: a hundred times what rounding in float32 does, twice that of bfloat16.
LOST = 1e-2
MEASURED_VALUES = 1 << 22  # of the input that BN307 makes: 16 MiB in float32
# How far the second data have to be from the first, over the channels, beyond what samples explain.
MOVED_MEAN, MOVED_LOG_VARIANCE = 0.1, 0.2


def constant_channels(subject: Subject) -> Iterator[Finding]:
    """Channels with nothing to normalise."""
    for layer, seen in subject.observed():
        if seen.population is None or not seen.population.count > 1:
            continue
        mean, variance = seen.population.mean, seen.variance
        weight = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().to(mean)
        scale = weight.abs() / (variance + layer.eps).sqrt()
        limit = CONSTANT**2 * torch.minimum(mean.square(), torch.full_like(mean, layer.eps))
        constant = (variance <= limit) & (mean.abs() > CONSTANT * math.sqrt(layer.eps)) & (scale > LARGE_SCALE)
        zero = (variance == 0) & (mean == 0)
        if bool(constant.any()):
            channels = constant.nonzero().flatten()
            worst = channels[scale[channels].argsort(descending=True)][:ROWS].tolist()
            yield Finding(
                "BN304",
                "warning",
                layer.name,
                f"{len(channels)} of {len(mean)} channels are constant, and multiplied by up to "
                f"{float(scale[channels].max()):.3g}: rounding, and any other value to come",
                _no_scale(layer, channels.tolist()),
                Table(
                    "constant channels",
                    ("channel", "mean", "variance", "scale"),
                    [
                        (str(c), f"{float(mean[c]):.4g}", f"{float(variance[c]):.2g}", f"{float(scale[c]):.3g}")
                        for c in worst
                    ],
                ),
                weight=float(scale[channels].max()),
            )
        elif bool(zero.any()):
            yield Finding(
                "BN304",
                "info",
                layer.name,
                f"{int(zero.sum())} of {len(mean)} channels are always 0",
                f"# prune channels {zero.nonzero().flatten().tolist()[:ROWS]} before {layer.path}",
                weight=float(zero.double().mean()),
            )


def _no_scale(layer: LayerState, channels: list[int]) -> str:
    if layer.weight is None:
        return f"# prune channels {channels} before {layer.path}"
    return f"{layer.path}.weight.data[{channels}] = 0.0"


def non_finite_activations(subject: Subject) -> Iterator[Finding]:
    """Where inf or NaN comes in first."""
    if subject.data is None or not subject.data.non_finite:
        return
    first = next(iter(subject.data.non_finite.values()))
    found = graph(subject)
    state = next((layer for layer in subject.layers if layer.name == first.layer), None)
    calls = [] if found is None or state is None else found.calls(state)
    feeding = [met for call in calls for met in (found.upstream(call) if found else ()) if met.kind != "input"]
    above = found.where(feeding[0]) if found is not None and feeding else None
    source = "" if above is None else f", out of {above}"
    where = "model" if state is None else state.path
    yield Finding(
        "BN305",
        "error",
        first.layer,
        f"inf or NaN comes into {first.channels} channels in batch {first.batch}{source}; of "
        f"{len(subject.data.non_finite)} layers it is the first",
        f"# look at batch {first.batch}, and at what feeds {where}{'' if above is None else f': {above}'}",
    )


def padding_counted(subject: Subject) -> Iterator[Finding]:
    """Sequences whose ends are padding, which counts as data."""
    for layer, seen in subject.observed():
        shape, axis = seen.input.shape, seen.input.channel_dim
        # Images have borders of one colour, which are data.
        if seen.padding is None or len(shape) != 3 or axis not in (1, 2) or _masked(layer, seen):
            continue
        if shape[3 - axis] < SHORTEST or shape[axis] < FEWEST_CHANNELS or not PADDED < seen.padding < ALL_ALIKE:
            continue
        yield Finding(
            "BN306",
            "warning",
            layer.name,
            f"{seen.padding:.0%} of the positions, at the ends of samples, hold one and the same vector: padding that "
            f"counts as data",
            f"bn.convert(model)\n# and in forward, with mask (N, L), True where there is data: "
            f"{layer.path.replace('model', 'self', 1)}(x, mask=mask)",
            weight=seen.padding,
        )


def _masked(layer: LayerState, seen: ObservedLayer) -> bool:
    """Whether a layer of ours was told by a mask what counts: fewer values than came."""
    count = None if seen.population is None else float(seen.population.count)
    return layer.ours is not None and count is not None and count < len(seen.sample_means) * seen.sample_values


def cancellation(subject: Subject) -> Iterator[Finding]:
    """Means so far from 0 that torch's layer loses the deviations from them."""
    for layer, seen in subject.observed():
        if layer.ours is not None or seen.population is None or not seen.population.count > 1:
            continue
        if not seen.input.dtype.is_floating_point:
            continue
        mean, sd = seen.population.mean, seen.variance.sqrt()
        far = (sd > 0) & (mean.abs() > FAR_MEAN * sd)
        if not bool(far.any()):
            continue
        error = _error(layer, seen)
        lost = far & (error > LOST)
        if not bool(lost.any()):
            continue
        worst = error.where(lost, torch.zeros_like(error)).argsort(descending=True)[: min(ROWS, int(lost.sum()))]
        top = int(worst[0])
        yield Finding(
            "BN307",
            "warning",
            layer.name,
            f"the mean is up to {float((mean.abs() / sd)[lost].max()):.3g} SD from 0: torch's layer in "
            f"{str(seen.input.dtype).removeprefix('torch.')} is off by {float(error[top]):.2g} SD",
            "bn.convert(model)",
            Table(
                "torch's layer against float64, on an input of these moments",
                ("channel", "mean", "SD", "error, SD"),
                [
                    (str(c), f"{float(mean[c]):.4g}", f"{float(sd[c]):.3g}", f"{float(error[c]):.2g}")
                    for c in worst.tolist()
                ],
            ),
            weight=float(error[top]),
        )


def _error(layer: LayerState, seen: ObservedLayer) -> Tensor:
    """(C,) the rms error of torch's layer in training, on an input of these moments, this dtype and layout."""
    assert seen.population is not None
    state = layer.mean if layer.mean is not None else layer.weight
    device = seen.population.mean.device if state is None or state.is_meta else state.device
    shape = list(seen.input.shape)
    shape[0] = max(1, min(shape[0], MEASURED_VALUES // max(1, math.prod(shape[1:]))))
    if math.prod(shape) == shape[1]:  # one value a channel
        shape[0] = 2
    generator = torch.Generator().manual_seed(0)
    view = (1, -1, *[1] * (len(shape) - 2))
    mean, sd = seen.population.mean.cpu(), seen.variance.cpu().sqrt()
    x = (torch.randn(shape, generator=generator) * sd.view(view) + mean.view(view)).to(device, seen.input.dtype)
    if seen.input.channels_last:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    with torch.no_grad():
        y = F.batch_norm(x, None, None, training=True, eps=layer.eps).cpu().double()
    exact = x.cpu().double()
    dims = [dim for dim in range(len(shape)) if dim != 1]
    exact = (exact - exact.mean(dims, keepdim=True)) / (exact.var(dims, correction=0, keepdim=True) + layer.eps).sqrt()
    return (y - exact).square().mean(dims).sqrt().nan_to_num(nan=math.inf).to(seen.population.mean)


def data_have_moved(subject: Subject) -> Iterator[Finding]:
    """The second data have other moments than the first."""
    if subject.second is None:
        return
    states = {layer.name: layer for layer in subject.layers}
    moved: list[tuple[LayerState, float, float]] = []
    assert subject.data is not None
    for name, seen in subject.data.layers.items():
        second = subject.second.layers.get(name)
        if second is None or name not in states:
            continue
        far = _moved(states[name], seen, second)
        if far is not None:
            moved.append((states[name], *far))
    if not moved:
        return
    first, shift, log_ratio = moved[0]
    yield Finding(
        "BN308",
        "warning",
        first.name,
        f"in the second data the means are {shift:.2g} SD away, and the variances differ by a factor of "
        f"{math.exp(log_ratio):.2f}; it is the first of {len(moved)} layers that moved",
        "bn.recalibrate(model, second)",
        Table(
            "the second data against the first, in call order",
            ("layer", "mean, SD (rms)", "log variance ratio (median)"),
            [(display_name(layer.name), f"{s:.3f}", f"{r:.3f}") for layer, s, r in moved[:ROWS]],
        ),
        weight=max(shift, log_ratio),
    )


def _moved(layer: LayerState, first: ObservedLayer, second: ObservedLayer) -> tuple[float, float] | None:
    """How far means and variances are apart beyond what samples explain; None if neither is."""
    shares = share_of_samples(first), share_of_samples(second)
    if first.population is None or second.population is None or None in shares:
        return None
    apart = difference(first.population, second.population, layer.eps)
    # Of variances the median: a channel that hardly varies but for one odd sample is anywhere in other data.
    shift, log_ratio = rms(apart.shift), float(apart.log_ratio.abs().median())
    noise = sum(share / len(seen.sample_means) for share, seen in zip(shares, (first, second), strict=True) if share)
    # A variance is as noisy as a mean, twice, of normal values; of those with heavy tails more.
    if shift > max(MOVED_MEAN, math.sqrt(BEYOND_NOISE * noise)):
        return shift, log_ratio
    if log_ratio > max(MOVED_LOG_VARIANCE, math.sqrt(BEYOND_NOISE * 2 * 2 * noise)):
        return shift, log_ratio
    return None


CHECKS = (
    Check(
        "BN304",
        "constant-channels",
        "warning",
        "data",
        "channels are constant, and their scale is large",
        "prune them, or set gamma to 0",
        fixed=False,
        run=constant_channels,
    ),
    Check(
        "BN305",
        "non-finite-activations",
        "error",
        "data",
        "inf or NaN comes into a layer",
        "look at the layer above it, and at that batch",
        fixed=False,
        run=non_finite_activations,
    ),
    Check(
        "BN306",
        "padding-counted",
        "warning",
        "data",
        "more than a tenth of the positions of sequences, at their ends, hold one and the same vector",
        "a mask",
        fixed=False,
        run=padding_counted,
    ),
    Check(
        "BN307",
        "cancellation",
        "warning",
        "data",
        "the mean is so far from 0 beside the standard deviation that torch's layer is off by more than 0.01 SD",
        "`bn.convert`",
        fixed=True,
        run=cancellation,
    ),
    Check(
        "BN308",
        "data-have-moved",
        "warning",
        "second",
        "the second data have other moments than the first",
        "recalibrate on them",
        fixed=False,
        run=data_have_moved,
    ),
)
