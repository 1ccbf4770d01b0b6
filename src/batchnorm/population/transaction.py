"""All or nothing: whatever happens, a model is as it was, but for the running statistics of a run that succeeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from batchnorm._torch import without_compiled_code
from batchnorm.models.buffers import SavedBuffers
from batchnorm.models.modes import preserved_modes
from batchnorm.population.layers import Layer
from batchnorm.population.torch_state import TorchState


@contextmanager
def transaction(model: nn.Module, layers: Sequence[Layer], devices: set[str]) -> Iterator[None]:
    """Inside, without gradients and compiled code; afterwards everything is put back.

    Training flags, every buffer (the object and its values), grad mode, autocast and random streams are as before,
    after any exception, Ctrl-C included. Without one, the running statistics of `layers` stay as they have become.

    Args:
        model: what is run inside.
        layers: whose statistics may stay.
        devices: the kinds of devices whose autocast state is kept.
    """
    buffers, torch_state = SavedBuffers(model), TorchState.here(devices)
    with preserved_modes(model):
        try:
            with torch.no_grad(), without_compiled_code():
                yield
            for layer in layers:
                buffers.accept(layer.mean)
                buffers.accept(layer.var)
        finally:
            buffers.restore()
            torch_state.restore()
