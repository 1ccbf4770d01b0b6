"""What data showed, as plain numbers."""

from __future__ import annotations

import torch

from batchnorm import Moments
from batchnorm.diagnosis.observation import Input, ObservedLayer
from support.comparison import close


def test_the_variance_is_the_populations() -> None:
    x = torch.randn(9, 3, dtype=torch.float64)
    layer = ObservedLayer(Input((9, 3), x.dtype, False, 1), population=Moments.of(x))
    close(layer.variance, x.var(0, correction=0))
