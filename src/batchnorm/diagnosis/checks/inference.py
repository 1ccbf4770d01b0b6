"""BN301: inference by running statistics that are not the population's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.finding import Finding, Severity
from batchnorm.diagnosis.gap import Far, Gap
from batchnorm.diagnosis.subject import LayerState, Subject
from batchnorm.report.document import Table

# Root mean square over channels, in standard deviations or in the logarithm of the variance: the noise of an average
# over the last ten batches of a few dozen values stays below. One channel may be off by ten times that.
FAR = 0.1
ONE_CHANNEL = 1.0
# A population of few samples is a guess, too: as many of its standard errors are nothing.
ERRORS = 4.0
# What it does, by exact statistics' measure: the outputs' distance, the share of changed decisions, the rise of the
# loss. Below the first, nobody would see it; above the second, it is what users come for.
NOTICED = {"distance": 0.1, "changed": 0.02, "loss": 0.02}
SEVERE = {"distance": 0.5, "changed": 0.1, "loss": 0.1}
# Of the gap: a layer that neither closes as much nor leaves as much has no part in it.
PART = 0.05
SHOWN = 8


def is_far(far: Far) -> bool:
    """Whether a layer's running statistics are further from the population than sampling explains."""
    if not math.isfinite(far.moved):
        return True
    most = max(float(t.abs().max()) if t.numel() else 0.0 for t in (far.shift, far.log_ratio))
    # The relative error of a variance is about the root of two times that of a mean in standard deviations.
    noise = ERRORS * math.sqrt(2) * far.noise
    return far.moved > max(FAR, noise) or most > max(ONE_CHANNEL, 2 * noise)


def is_fresh(subject: Subject) -> bool:
    """Whether no layer has seen a batch: then there is nothing yet to be wrong."""
    return all(
        layer.mean is None or layer.var is None or (not layer.mean.any() and bool((layer.var == 1).all()))
        for layer in subject.layers
    )


def gap_severity(gap: Gap) -> Severity | None:
    """How bad what running statistics do is; None where nobody would see it."""
    running, exact = gap.mode("running"), gap.mode("exact")
    if running.distance is None:
        return "error"
    sizes = {"distance": running.distance, "changed": running.changed or 0.0, "loss": 0.0}
    if running.loss is not None and exact.loss is not None:
        rise = running.loss - exact.loss
        sizes["loss"] = rise / abs(exact.loss) if exact.loss else 0.0
    if any(sizes[name] > SEVERE[name] for name in sizes):
        return "error"
    return "warning" if any(sizes[name] > NOTICED[name] for name in sizes) else None


def inference_gap(subject: Subject) -> Iterator[Finding]:
    """Running statistics far from the population, and what that does."""
    gap = subject.gap
    severity = None if gap is None or is_fresh(subject) else gap_severity(gap)
    if gap is None or severity is None:
        return
    parts = {part.layer: part for part in gap.attribution}
    for layer in subject.layers:
        far, part = subject.far.get(layer.name), parts.get(layer.name)
        if far is None or part is None or not is_far(far) or max(part.closes, part.remains) < PART:
            continue
        yield Finding(
            "BN301",
            severity,
            layer.name,
            f"the running mean is off by {_rms(far.shift)} SD, the running variance by {_rms(far.log_ratio)} in its "
            f"logarithm: {part.remains:.0%} of the gap in the {gap.measure} if it alone is wrong",
            "bn.recalibrate(model, batches)",
            _worst(layer, far),
            max(part.remains, part.closes),
        )


def _rms(values: Tensor) -> str:
    return f"{float(values.square().mean().sqrt()):.2g}"


def _worst(layer: LayerState, far: Far) -> Table:
    """The channels that are furthest off."""
    off = torch.maximum(far.shift.abs(), far.log_ratio.abs()).nan_to_num(nan=math.inf)
    rows = [
        (str(c), f"{float(far.shift[c]):+.3g}", f"{float(far.log_ratio[c]):+.3g}")
        for c in off.argsort(descending=True)[:SHOWN].tolist()
    ]
    return Table(
        f"the channels that are furthest off, of {layer.num_channels}",
        ("channel", "mean, SD", "log variance ratio"),
        rows,
    )


CHECKS = (
    Check(
        "BN301",
        "inference-gap",
        "error",
        "data",
        "running statistics are far from the population, and inference with them differs from inference with exact "
        "ones",
        "recalibrate",
        fixed=True,
        run=inference_gap,
    ),
)
