"""Reports made by hand: with everything that a report may have, hostile names included."""

from __future__ import annotations

import math
from typing import Any

import torch

from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import LayerAttribution, Mode, ReportedLayer
from batchnorm.population.result import SkippedLayer
from batchnorm.report.document import Table

HOSTILE = "x\x1b[2J<script>[red]\u202e" + "y" * 400
EVIDENCE = Table(
    "Worst channels", ("channel", "running mean", "population's"), [("4", "1.24", "-0.8"), ("9", "2", "0")]
)


def finding(
    code: str = "BN101", severity: Any = "warning", layer: str = "a", message: str = "it is so", **more: Any
) -> Finding:
    return Finding(code, severity, layer, message, **{"remedy": f"model.{layer}.momentum = 0.01", **more})


def reported(name: str, shift: float = 0.02, ratio: float = 0.05, channels: int = 8) -> ReportedLayer:
    spread = torch.linspace(-1, 1, channels, dtype=torch.float64)
    return ReportedLayer(name, "BatchNorm2d", channels, (4, channels, 5, 5), 400, shift * spread, ratio * spread)


def full(layers: int = 12, *, hostile: bool = True, **more: Any) -> Report:
    """Two errors, many warnings, two infos; data, loss, attribution."""
    names = [f"layer{i // 4 + 1}.{i % 4}.bn" for i in range(layers)]
    if hostile:
        names[3] = HOSTILE
    off = [reported(name, *((0.02, 0.05), (0.2, 0.5), (2, 0.1), (0.1, 5))[i % 4]) for i, name in enumerate(names)]
    off += [ReportedLayer("aux.bn", "BatchNorm1d", 10)]
    findings = [
        finding("BN404", "info", "", "lr / norm^2 differs by 3 orders of magnitude", remedy=""),
        finding(
            "BN201", "info", names[0], "the bias of conv1 is taken away again", remedy="bn.remove_dead_biases(model)"
        ),
        *(finding("BN101", layer=name, message="momentum is 0.99", weight=0.99) for name in names),
        *(
            finding("BN205", layer=name, message=f"{i + 2} values a channel", weight=-i, remedy="")
            for i, name in enumerate(names[:6])
        ),
        finding(
            "BN001",
            "error",
            names[1],
            "statistics are still 0 and 1 after 120 batches",
            remedy="bn.recalibrate(model, batches)",
        ),
        finding(
            "BN301",
            "error",
            names[2],
            "running mean 3.1 SD from the data's",
            remedy="bn.recalibrate(model, batches)",
            evidence=EVIDENCE,
        ),
    ]
    parts: dict[str, Any] = {
        "skipped": [SkippedLayer("aux.bn", "never called")],
        "batches": 4,
        "samples": 128,
        "passes": 1.4,
        "attribution": [LayerAttribution(name, 0.93 / (i + 1), 0.91 / (i + 1)) for i, name in enumerate(names)],
        "measure": "loss",
        "modes": [Mode("running", 0.81, 0.62, 2.31), Mode("exact", 0.0, 0.0, 0.12), Mode("batch", 0.03, 0.008, 0.13)],
    }
    return Report(findings, off, **{**parts, **more})


def fixed(layers: int = 12) -> Report:
    """The same after its statistics were put right."""
    before = full(layers)
    right = [reported(layer.name, 1e-7, 1e-7) for layer in before.layers]
    return Report(before.at_least("info")[-2:], right, batches=4, samples=128, passes=1.4, before=before)


def not_finite() -> Report:
    layer = reported("bad")
    assert layer.shift is not None
    layer.shift[2] = math.nan
    return Report(
        [],
        [layer, reported("good")],
        batches=1,
        samples=4,
        passes=math.inf,
        modes=[Mode("running", math.nan, None, math.inf)],
    )
