"""How far a changed model is from the original on example inputs, and how far it may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.modes import inference
from batchnorm.models.nested import tensors
from batchnorm.surgery.observing import forward

# How far off outputs may be, relative to the largest of them. Rounding is far below, except where a layer takes away a
# mean of many standard deviations: there the unchanged model is as far off as the changed one.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The same for the whole model: the differences of its layers add up, and later layers may enlarge them.
ALTOGETHER = 10


def outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:  # noqa: ANN401 - as `forward`
    """The tensors that a model returns in inference."""
    with inference(model):
        return list(tensors(forward(model, example_inputs)))


def difference(actual: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """The largest difference relative to the largest value, of all outputs; and what it may be in their dtypes."""
    worst, tolerance = 0.0, min(TOLERANCE.values())
    for a, b in zip(actual, expected, strict=True):
        if not b.is_floating_point() or b.numel() == 0:
            continue
        size = b.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = float(((a.double() - b.double()).abs().max() / size).nan_to_num(nan=float("inf")))
        worst, tolerance = max(worst, error), max(tolerance, TOLERANCE.get(b.dtype, 0.0))
    return worst, tolerance
