"""The training flags of a model's modules: set, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def set_training(module: nn.Module, training: bool) -> None:
    """One module's flag, and not by train() or eval(), which a model may have made to do more."""
    if module.training != training:
        module.training = training


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards, every module's training flag is as it was, whatever happens inside."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            set_training(module, training)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in inference mode and no gradients are recorded; afterwards each module is as it was."""
    with preserved_modes(model), torch.no_grad():
        for module in model.modules():
            set_training(module, False)
        yield
