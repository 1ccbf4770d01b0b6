"""BN205, BN302 and BN303: what mini-batches are as samples of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.finding import Finding, Severity
from batchnorm.diagnosis.noise import chi_square_quantile, samples_of_a_batch, values_in_effect
from batchnorm.diagnosis.observation import ObservedLayer
from batchnorm.diagnosis.permutation import between_batches
from batchnorm.diagnosis.subject import LayerState, Subject
from batchnorm.models.norm_layers import display_name
from batchnorm.report.document import Table

ROWS = 8  # of a table of evidence

# The noise of normalising by a batch's own statistics, in parts of the output's variance: see `few_values`. 10 % is a
# batch of 15 independent values; 16 and more, the usual smallest, stay below.
NOISE = 0.1
# What BN302 speaks of: means of batches that scatter by a tenth of a standard deviation, and twice as much as the
# square-root law says, in squares: half of the values tell nothing.
SCATTER, EXCESS = 0.1, 2.0
# One false alarm in ten thousand networks, if all channels of a layer were one.
FALSE_SCATTER = 1e-4
# The share of the variance of samples' means that lies between batches: with 32 samples a batch, it doubles the
# variance of a batch's mean.
BETWEEN = 0.03


def few_values(subject: Subject) -> Iterator[Finding]:
    r"""Batches too small to normalise by.

    With y = (x - mean_b) / sd_b of a batch and z of the population, the mean square of y - z over a batch is
    mean_b^2 + (sd_b - 1)^2 in units of the population: 1 / n + 1 / (2 n) of n independent values.
    """
    for layer, seen in subject.observed():
        counts = sorted(float(batch.count) for batch in seen.batches if batch.count > 0)
        if not counts or not _by_batches(layer):
            continue
        typical, samples = counts[len(counts) // 2], samples_of_a_batch(seen)
        single = typical == 1 or (counts[0] == 1 and layer.ours is None)
        if single:
            some = "a batch" if typical == 1 else f"{counts.count(1)} of {len(counts)} batches"
            message = f"one value a channel in {some}: it has no variance, and training cannot normalise it"
            severity: Severity = "error" if typical == 1 else "warning"
            yield Finding("BN205", severity, layer.name, message, _larger(layer, typical == 1), weight=1.0)
            continue
        ghost = layer.ours.virtual_batch_size if layer.ours is not None else None
        if ghost is not None and samples > ghost:
            typical, samples = typical * ghost / samples, float(ghost)
        effective = values_in_effect(seen, samples)
        if effective is None:
            continue
        noise = 1 / effective + min(0.5 / effective, _scale_noise(seen))
        if noise > NOISE:
            yield Finding(
                "BN205",
                "warning",
                layer.name,
                f"{typical:.0f} values a channel in a batch of {samples:.0f} samples, as good as {effective:.1f} "
                f"independent ones: the noise of batch statistics is {noise:.0%} of the output's variance",
                _larger(layer, single=False),
                weight=noise,
            )


def _by_batches(layer: LayerState) -> bool:
    """Whether training normalises by the batch of this process, as it is."""
    ours = layer.ours
    if ours is None:
        return not isinstance(layer.module, nn.SyncBatchNorm)
    return not (ours.frozen.normalization or ours.sync or ours.renorm is not None)


def _scale_noise(seen: ObservedLayer) -> float:
    """The mean square of sd_b - 1; infinite where there is one batch."""
    batches = [batch for batch in seen.batches if batch.count > 0]
    if len(batches) < 2:
        return math.inf
    variance = seen.variance
    live = variance > 0
    off = [((batch.var()[live] / variance[live]).sqrt() - 1).square().mean() for batch in batches]
    return float(torch.stack(off).mean()) * len(batches) / (len(batches) - 1)


def _larger(layer: LayerState, single: bool) -> str:
    if single:
        return "bn.freeze(bn.convert(model))  # or larger batches; drop_last=True in the DataLoader"
    if layer.ours is not None and layer.ours.virtual_batch_size is not None:
        return f"{layer.path}.virtual_batch_size = None  # or larger ghost batches"
    if layer.mean is None:  # nothing to renormalise by
        return "bn.convert(model, sync=True)  # over several processes; or larger batches"
    return f"bn.convert(model); {layer.path}.renorm = bn.Renorm()  # or larger batches, sync=True, bn.freeze"


def noisy_statistics(subject: Subject) -> Iterator[Finding]:
    """Means of batches that scatter more than values that are independent would."""
    observed = subject.observed()
    for layer, seen in observed:
        batches = [batch for batch in seen.batches if batch.count > 1]
        if len(batches) < 2 or not _by_batches(layer):
            continue
        variance = seen.variance
        live = variance > 0
        if seen.population is None or not bool(live.any()):
            continue
        squares = [
            batch.count * (batch.mean - seen.population.mean).square()[live] / variance[live] for batch in batches
        ]
        excess = float(torch.stack(squares).sum(0).mean()) / (len(batches) - 1)
        typical = sorted(float(batch.count) for batch in batches)[len(batches) // 2]
        scatter, law = math.sqrt(excess / typical), math.sqrt(1 / typical)
        chance = chi_square_quantile(1 - FALSE_SCATTER / len(observed), len(batches) - 1) / (len(batches) - 1)
        if scatter > SCATTER and excess > max(EXCESS, chance):
            yield Finding(
                "BN302",
                "info",
                layer.name,
                f"means of batches scatter by {scatter:.2g} SD; of {typical:,.0f} independent values it would be "
                f"{law:.2g}: they are worth {typical / excess:.1f}",
                _larger(layer, single=False),
                weight=scatter,
            )


def batches_not_alike(subject: Subject) -> Iterator[Finding]:
    """Batches that differ by more than random draws of the same samples."""
    data = subject.data
    if data is None or data.batches < 2 or not data.samples:
        return
    # Where a row is no sample, but a box or a frame of one, rows of a batch are alike, however samples were drawn.
    fit = [(layer, seen) for layer, seen in subject.observed() if len(seen.sample_means) == data.samples]
    if not fit:
        return
    found = between_batches([seen.sample_means for _, seen in fit], fit[0][1].batch_of, least=BETWEEN)
    large = [
        (one, layer) for (layer, _), one in zip(fit, found, strict=True) if one.significant and one.share > BETWEEN
    ]
    if not large:
        return
    worst, layer = max(large, key=lambda pair: pair[0].share)
    rows = sorted(large, key=lambda pair: -pair[0].share)[:ROWS]
    yield Finding(
        "BN303",
        "warning",
        layer.name,
        f"{worst.share:.0%} of the variance between samples lies between batches, and of random draws about none "
        f"would; in {len(large)} of {len(fit)} layers",
        "batches = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True)",
        Table(
            "samples' means: the share of variance between batches",
            ("layer", "share", "SDs beyond permuted samples"),
            [(display_name(layer.name), f"{one.share:.1%}", f"{one.score:.1f}") for one, layer in rows],
        ),
        weight=worst.share,
    )


CHECKS = (
    Check(
        "BN205",
        "few-values",
        "error",
        "data",
        "a batch has so few values a channel that the noise of its statistics is more than 10 % of the output's "
        "variance; an error where it has one",
        "larger or synchronised batches, batch renormalization, freezing",
        fixed=False,
        run=few_values,
    ),
    Check(
        "BN302",
        "noisy-statistics",
        "info",
        "data",
        "means of batches scatter by more than a tenth of a standard deviation, and more than the square-root law says",
        "larger, synchronised or shuffled batches, batch renormalization",
        fixed=False,
        run=noisy_statistics,
    ),
    Check(
        "BN303",
        "batches-not-alike",
        "warning",
        "data",
        "batches differ by more than random draws of the same samples would",
        "shuffle",
        fixed=False,
        run=batches_not_alike,
    ),
)
