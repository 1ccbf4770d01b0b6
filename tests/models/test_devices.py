"""Where a model's tensors are."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.models.devices import device, device_types


def test_devices() -> None:
    assert device(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert device(nn.ReLU()) == torch.device("cpu")
    assert device(nn.BatchNorm1d(1, affine=False, device="meta")) == torch.device("meta")
    assert device_types(nn.Linear(1, 1, device="meta")) == {"cpu"}
