"""The numbers of a result, by the formulas, and how it prints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm.population.result import MemoryUse, RecalibratedLayer, Recalibration, SkippedLayer
from support.comparison import close


def layer(name: str, shift: float = 0.0, ratio: float = 0.0) -> RecalibratedLayer:
    old_mean, old_var = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])
    new_mean = old_mean + torch.tensor([0.0, shift])
    new_var = old_var * torch.tensor([0.0, ratio]).exp()
    return RecalibratedLayer(name, 1200, *(t.double() for t in (old_mean, old_var, new_mean, new_var)), 1e-5)


def test_shift_and_ratio() -> None:
    one = layer("a", shift=3.0, ratio=-2.0)
    close(one.shift, [0, 3 / np.sqrt(4 + 1e-5)], relative=1e-12)
    new_var = one.new_var.numpy()
    expected = np.log((new_var + 1e-5) / (np.array([1, 4]) + 1e-5))
    close(one.log_variance_ratio, expected, relative=1e-12)
    assert one.moved == abs(expected).max()
    assert layer("b", shift=-8.0).moved == 8 / np.sqrt(4 + 1e-5)


def test_a_layer_without_channels_did_not_move() -> None:
    assert RecalibratedLayer("a", 3, *[torch.zeros(0)] * 4, 1e-5).moved == 0


def test_it_prints_what_moved_most_first_and_what_was_skipped() -> None:
    layers = tuple(layer(f"layer{i}", shift=-i / 10) for i in range(12))
    text = str(Recalibration("exact", 3, 96, layers, (SkippedLayer("head", "frozen"),)))
    assert text.splitlines() == [
        "exact statistics of 12 layers from 3 batches with 96 samples",
        "layer           count  shift of mean, std  log variance ratio",
        "layer11         1,200               -0.55                   0",
        "layer10         1,200                -0.5                   0",
        "layer9          1,200               -0.45                   0",
        "layer8          1,200                -0.4                   0",
        "layer7          1,200               -0.35                   0",
        "layer6          1,200                -0.3                   0",
        "layer5          1,200               -0.25                   0",
        "layer4          1,200                -0.2                   0",
        "layer3          1,200               -0.15                   0",
        "layer2          1,200                -0.1                   0",
        "and 2 layers that moved less",
        "skipped: head (frozen)",
    ]


def test_it_prints_memory_only_where_it_was_short() -> None:
    def text(*memory: int) -> str:
        return str(Recalibration("exact", 1, None, (), (), MemoryUse(*memory)))

    assert text(1000, 900, 0, 0) == "exact statistics of 0 layers from 1 batch"
    assert text(1000, 900, 2500, 3).splitlines()[1] == (
        "memory: 900 bytes held of 1,000 allowed, 2,500 written to a file, 3 forward passes repeated"
    )


def test_the_former_name_of_what_was_skipped_still_works() -> None:
    skipped = (SkippedLayer("head", "frozen"),)
    with pytest.warns(DeprecationWarning, match=r"left_alone has become Recalibration\.skipped"):
        assert Recalibration("pooled", 1, 2, (), skipped).left_alone is skipped
