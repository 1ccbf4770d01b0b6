"""All or nothing: whatever happens, a model is as it was, but for the running statistics of a run that succeeded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

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
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {buffer: _copy(buffer) for _, named in buffers for buffer in named.values() if buffer is not None}
    surroundings = TorchState.here(devices)
    try:
        with torch.no_grad(), _eagerly():
            yield
        for layer in layers:
            values.pop(layer.mean, None), values.pop(layer.var, None)
    finally:
        for module, flag in flags:
            set_training(module, flag)
        for module, named in buffers:
            if list(map(id, module._buffers.values())) != list(map(id, named.values())):
                module._buffers.clear()
                module._buffers.update(named)
        for buffer, value in values.items():
            _write_back(buffer, value)
        surroundings.restore()


def set_training(module: nn.Module, flag: bool) -> None:
    """One module's flag, and not by train() or eval(), which a model may have made to do more."""
    if module.training != flag:
        module.training = flag


def _copy(buffer: Tensor) -> Tensor | None:
    """None for what has no values."""
    return None if buffer.is_meta or torch.nn.parameter.is_lazy(buffer) else buffer.detach().clone()


def _write_back(buffer: Tensor, value: Tensor | None) -> None:
    # Only what differs: a write would tell a graph that saved the buffer that it is no longer what it was.
    if value is not None and not torch.equal(buffer, value):
        with torch.inference_mode() if buffer.is_inference() else torch.no_grad():
            buffer.copy_(value)


def _eagerly() -> AbstractContextManager[object]:
    """Compiled models run as they were written, so that hooks are called."""
    # Without the compiler loaded, which takes seconds, there is nothing compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
