"""Options that torch's own layers have in some versions only."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

# Torch 2.10's batch-norm layers have no `bias` argument; ours do with every torch. For lists of torch's options.
BIAS_FALSE: list[dict[str, Any]] = [{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm2d).parameters else []
