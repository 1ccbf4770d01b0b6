"""How far a model is adapted, and how much that is worth: numbers to read, a table to print."""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchnorm.population.result import SHOWN, SkippedLayer
from batchnorm.population.seen import Seen

# Of an adapted mean's standard error, in standard deviations. The scale that a layer divides by is about as far off.
LARGEST_ERROR = 0.25


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer.

    Attributes:
        name: its first path in the model.
        samples: how many samples it has seen, by weight where older ones decay.
        values: of each channel, likewise.
        batches: how many batches.
        refused: how many more there were with inf or NaN, which were left out.
        effective: how many independent values these are worth, by how the batches' means scatter: values of one
            picture, film or class are less than independent ones. Of one batch: its samples.
        weight: the share of what was seen in the statistics: samples / (samples + prior).
    """

    name: str
    samples: float
    values: float
    batches: int
    refused: int
    effective: float
    weight: float

    @classmethod
    def of(cls, name: str, seen: Seen, prior: float) -> AdaptedLayer:
        """What a layer has seen."""
        values = float(seen.count)
        return cls(name, seen.samples, values, seen.batches, seen.refused, seen.effective, seen.weight(prior))

    @property
    def standard_error(self) -> float:
        """How far what was seen may move the mean by chance, in standard deviations: weight / sqrt(effective)."""
        return self.weight / math.sqrt(self.effective) if self.effective else 0.0

    @property
    def too_few(self) -> bool:
        """Whether that is more than a quarter of one."""
        return self.standard_error > LARGEST_ERROR

    @property
    def warning(self) -> str:
        """What to say where it is."""
        return (
            f'layer "{self.name}" is adapted by {self.samples:.4g} samples, which are worth about '
            f"{self.effective:.2g} independent values: its mean may be off by {self.standard_error:.2g} standard "
            f"deviations. Batches are small, or each is of one class or source. Give more and mixed samples, or a "
            f"larger prior"
        )


@dataclass(frozen=True)
class AdaptationReport:
    """How far a model is adapted. Prints as a table.

    Attributes:
        prior: how many samples the stored statistics weigh as much as.
        layers: those that are adapted and have seen something, in the model's order.
        skipped: the others, with the reason.
    """

    prior: float
    layers: tuple[AdaptedLayer, ...]
    skipped: tuple[SkippedLayer, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.layers):,} {'layer' if len(self.layers) == 1 else 'layers'} adapted, prior {self.prior:g}"]
        if self.layers:
            lines += _table(sorted(self.layers, key=lambda layer: -layer.standard_error)[:SHOWN])
        if (more := len(self.layers) - SHOWN) > 0:
            lines.append(f"and {more:,} more, with smaller errors")
        lines += [f"skipped: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join(lines)


def _table(layers: list[AdaptedLayer]) -> list[str]:
    width = max(len("layer"), *(len(layer.name) for layer in layers))
    columns = ("samples", "values", "effective", "weight", "std error", "refused")
    lines = [f"{'layer':<{width}}" + "".join(f"  {name:>9}" for name in columns)]
    for layer in layers:
        numbers = (layer.samples, layer.values, layer.effective, layer.weight, layer.standard_error)
        cells = [f"{number:.4g}" for number in numbers] + [f"{layer.refused:,}"]
        lines.append(f"{layer.name:<{width}}" + "".join(f"  {cell:>9}" for cell in cells))
    return lines
