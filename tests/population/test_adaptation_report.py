"""The numbers of an adaptation, and how it prints."""

from __future__ import annotations

import pytest

from batchnorm.population.adaptation_report import AdaptationReport, AdaptedLayer
from batchnorm.population.result import SkippedLayer


def layer(name: str, effective: float, weight: float = 1.0) -> AdaptedLayer:
    return AdaptedLayer(name, 64, 4096, 4, 0, effective, weight)


def test_the_standard_error() -> None:
    assert layer("a", 100).standard_error == 0.1
    assert layer("a", 100, 0.5).standard_error == 0.05
    assert layer("a", 0).standard_error == 0
    assert [layer("a", effective).too_few for effective in (15, 16)] == [True, False]
    assert not layer("a", 1, 0.2).too_few


def test_the_warning_says_what_was_seen() -> None:
    text = layer("bn", 4).warning
    assert text.startswith('layer "bn" is adapted by 64 samples, which are worth about 4 independent values: ')
    assert "0.5 standard deviations" in text


def test_it_prints_the_largest_errors_first_and_what_was_skipped() -> None:
    layers = tuple(layer(f"layer{i}", 100 - i) for i in range(12))
    lines = str(AdaptationReport(16.0, layers, (SkippedLayer("head", "frozen"),))).splitlines()
    assert lines[:3] == [
        "12 layers adapted, prior 16",
        "layer      samples     values  effective     weight  std error    refused",
        "layer11         64       4096         89          1      0.106          0",
    ]
    assert lines[-2:] == ["and 2 more, with smaller errors", "skipped: head (frozen)"]
    assert len(lines) == 2 + 10 + 2


@pytest.mark.parametrize(("layers", "first"), [((), "0 layers"), ((layer("a", 1),), "1 layer")])
def test_the_first_line_counts_layers(layers: tuple[AdaptedLayer, ...], first: str) -> None:
    assert str(AdaptationReport(0.5, layers, ())).splitlines()[0] == f"{first} adapted, prior 0.5"
