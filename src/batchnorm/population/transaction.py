"""All or nothing: whatever happens, a model is as it was, but for the running statistics of a run that succeeded."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from batchnorm._torch import without_compiled_code
from batchnorm.errors import OptionError
from batchnorm.models.buffers import SavedBuffers, Step, put_back
from batchnorm.models.modes import set_training
from batchnorm.population.interrupts import deliver, shielded, waits
from batchnorm.population.layers import Layer
from batchnorm.population.torch_state import TorchState


@contextmanager
def transaction(model: nn.Module, layers: Sequence[Layer], devices: set[str]) -> Iterator[None]:
    """Inside, without gradients and compiled code; afterwards everything is put back.

    Training flags, every buffer (the object and its values), grad mode, autocast and random streams are as before,
    after any exception, Ctrl-C included: that comes while the caller's own code runs, or at the end. Without one, the
    running statistics of `layers` stay as they have become.

    Args:
        model: what is run inside.
        layers: whose statistics may stay.
        devices: the kinds of devices whose autocast state is kept.

    Raises:
        OptionError: something could not be put back; all else is.
    """
    with shielded():
        buffers, torch_state = SavedBuffers(model), TorchState.here(devices)
        training = [(module, module.training) for module in model.modules()]

        def steps() -> Iterator[Step]:
            yield from buffers.steps()
            for module, flag in training:
                yield f"a {type(module).__name__}'s training flag", functools.partial(set_training, module, flag)
            yield "grad mode, autocast and random streams", torch_state.restore

        try:
            with torch.no_grad(), without_compiled_code():
                yield
            deliver()
        except BaseException as error:
            try:
                put_back(steps())
            except OptionError as failure:
                if isinstance(error, Exception):
                    raise failure from error
                if sys.version_info >= (3, 11):  # Ctrl-C stays what it is
                    error.add_note(str(failure))
            raise
        undo = buffers.accept([buffer for layer in layers for buffer in (layer.mean, layer.var)])
        put_back(steps())
        if waits():  # an interrupt that came since then: it is raised, so nothing may have happened
            put_back(undo)
