"""Training data, read while an epoch of training is under way."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader


def aside(batches: Iterable[Any]) -> Iterable[Any]:
    """The same batches, to be read without touching the original; what is no DataLoader is returned as it is.

    The data set is shared. Samplers and generators are copies, so the original's next order stays; an iterator under
    way, and its worker processes, stay the original's.
    """
    # accelerate's loaders keep count of who reads them, which steers gradient accumulation; this is the one inside.
    loader = getattr(batches, "base_dataloader", batches)
    if not isinstance(loader, DataLoader):
        return batches
    twin = copy.copy(loader)
    parts = {name: vars(loader)[name] for name in ("sampler", "batch_sampler", "generator")}
    shared = {id(loader.dataset): loader.dataset}
    # Not by setattr: a loader refuses other samplers once it is made.
    vars(twin).update(copy.deepcopy(parts, shared), _iterator=None)
    return twin
