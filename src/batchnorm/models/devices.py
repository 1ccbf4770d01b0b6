"""The devices that a model's tensors are on."""

from __future__ import annotations

import itertools

import torch
from torch import nn


def device(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer is; the CPU for a model without any."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def device_types(model: nn.Module) -> set[str]:
    """The kinds of devices that a model's tensors are on, and the CPU."""
    return {"cpu"} | {t.device.type for t in [*model.parameters(), *model.buffers()]} - {"meta"}
