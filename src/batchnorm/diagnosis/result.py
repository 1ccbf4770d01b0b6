"""What a check found out, as plain data: of layers, of the gap, and of what was put right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from batchnorm.diagnosis.report import Report

Measure = Literal["loss", "output"]


@dataclass(frozen=True, eq=False)
class ReportedLayer:
    """One layer, and how far its running statistics are from the population's.

    Attributes:
        name: its first path in the model; "" is the model itself.
        kind: the name of its class; "" of a state_dict.
        channels: how many.
        input_shape: of the first input that data brought; None where none came.
        count: the values of each channel that the population is of; a float where a mask weighed them.
        shift: (C,) float64, (running mean - population mean) in standard deviations of the population; None without
            data or without statistics.
        log_variance_ratio: (C,) float64, log((running_var + eps) / (population variance + eps)); likewise.
    """

    name: str
    kind: str
    channels: int
    input_shape: tuple[int, ...] | None = None
    count: int | float | None = None
    shift: Tensor | None = None
    log_variance_ratio: Tensor | None = None

    @property
    def worst_shift(self) -> float | None:
        """The shift that is largest in magnitude, with its sign; NaN where one is. None without data."""
        return _worst(self.shift)

    @property
    def worst_log_variance_ratio(self) -> float | None:
        """Of the log variance ratios, likewise."""
        return _worst(self.log_variance_ratio)

    @property
    def off(self) -> float | None:
        """How far the statistics are off: the larger of both in magnitude; inf where a statistic is not finite."""
        both = [value for value in (self.worst_shift, self.worst_log_variance_ratio) if value is not None]
        if not both:
            return None
        return max(abs(value) if math.isfinite(value) else math.inf for value in both)


class LayerAttribution(NamedTuple):
    """How much of the gap between running and exact statistics is one layer's.

    Attributes:
        layer: its name.
        closes: the share of the gap that closes when this layer alone is put right.
        remains: the share that is left when this layer alone is wrong.
    """

    layer: str
    closes: float
    remains: float


class Mode(NamedTuple):
    """What inference gives with one kind of statistics, on the same batches.

    Attributes:
        name: "running", "exact" or "batch".
        distance: of the outputs from those with exact statistics, relative to these; None where they are not finite.
        changed: the share of decisions (the largest of the outputs) that differ; None where the output is no logits.
        loss: the mean loss; None without a loss.
    """

    name: str
    distance: float | None
    changed: float | None = None
    loss: float | None = None


class Fix(NamedTuple):
    """One thing that was put right.

    Attributes:
        code: of the check.
        layer: its name.
        what: what was done, in a few words.
        before: the numbers before, or "".
        after: and after.
    """

    code: str
    layer: str
    what: str
    before: str = ""
    after: str = ""


class Fixed(NamedTuple):
    """What `Report.fix` did.

    Attributes:
        done: one entry for each thing; empty where there was nothing to do.
        report: the same check again; its `before` is the report before.
    """

    done: tuple[Fix, ...]
    report: Report


def _worst(values: Tensor | None) -> float | None:
    if values is None or not values.numel():
        return None
    return float(values[values.abs().argmax()])  # NaN counts as the largest
