"""The buffers of a model: saved, and put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm._torch import buffers_of


class SavedBuffers:
    """Every buffer of a model as it is now: the tensors, by module and name, and their values.

    Args:
        model: any module. Buffers without values (lazy ones, those on the device "meta") are saved as objects alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(module, dict(buffers_of(module))) for module in model.modules()]
        every = [buffer for _, named in self._buffers for buffer in named.values() if buffer is not None]
        self._values = {buffer: _copy(buffer) for buffer in every}

    def accept(self, buffer: Tensor) -> None:
        """Let a buffer keep the values that it has by the time of `restore`."""
        self._values.pop(buffer, None)

    def restore(self) -> None:
        """Put everything back."""
        for module, named in self._buffers:
            if list(map(id, buffers_of(module).values())) != list(map(id, named.values())):
                buffers_of(module).clear()
                buffers_of(module).update(named)
        for buffer, value in self._values.items():
            _write_back(buffer, value)


def _copy(buffer: Tensor) -> Tensor | None:
    """None for what has no values."""
    return None if buffer.is_meta or torch.nn.parameter.is_lazy(buffer) else buffer.detach().clone()


def _write_back(buffer: Tensor, value: Tensor | None) -> None:
    # Only what differs: a write would tell a graph that saved the buffer that it is no longer what it was.
    if value is not None and not torch.equal(buffer, value):
        with torch.inference_mode() if buffer.is_inference() else torch.no_grad():
            buffer.copy_(value)
